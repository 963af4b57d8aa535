"""Iterative magnitude pruning with rewinding as one plain loop, written from the papers.

Frankle & Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671: train to the end of
the round, prune the smallest of what is left, go back to step k (weights, buffers, optimizer and
schedule, all of step k), set what is pruned to zero, train the round again.
"""

from __future__ import annotations

import copy

import torch


def smallest_first(weights, masks, count):
    """The places of `count` weights of all tensors: pruned ones, then the smallest; then order."""
    places = []
    for order, name in enumerate(masks):
        flat, kept = weights[name].flatten().tolist(), masks[name].flatten().tolist()
        places += [(kept[i], abs(flat[i]), order, i, name) for i in range(len(flat))]
    return [(name, i) for _, _, _, i, name in sorted(places)[:count]]


def apply(model, optimizer, masks):
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        weights[name].data[~mask] = 0.0
        for value in optimizer.state.get(weights[name], {}).values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                value[~mask] = 0.0


def ticket(model, optimizer, scheduler, step_of, names, *, sparsity, rounds, back, ends, total):
    """Trains for `total` steps; `step_of(step)` gives the loss of the run's step.

    Gives weights, buffers, optimizer state, rate and masks after every step of the run.
    """
    weights = dict(model.named_parameters())
    masks = {n: torch.ones_like(weights[n], dtype=torch.bool) for n in names}
    size = sum(m.numel() for m in masks.values())
    trace, kept, done = {}, None, 0
    for step in range(total + 1):
        if step == back and kept is None:
            kept = copy.deepcopy(
                (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
            )
        if step in ends:
            done += 1
            due = sparsity if done == rounds else 1 - (1 - sparsity) ** (done / rounds)
            gone = smallest_first(weights, masks, round(due * size))
            for name, i in gone:
                masks[name].view(-1)[i] = False
            before = copy.deepcopy(kept)
            model.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
            scheduler.load_state_dict(before[2])
            apply(model, optimizer, masks)
        if step:
            trace[step] = copy.deepcopy(
                {
                    "model": dict(model.state_dict()),
                    "moments": list(optimizer.state_dict()["state"].values()),
                    "rate": optimizer.param_groups[0]["lr"],
                    "masks": masks,
                }
            )
        if step < total:
            optimizer.zero_grad()
            step_of(step).backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name][~mask] = 0.0
            scheduler.step()
    return trace
