"""One score a neuron, blocks elsewhere, masked biases: every step against scores in the graph."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.callbacks import MovementPruning
from tests.hybrid import (
    BATCH,
    LAST,
    NEURONS,
    SPARSITY,
    STEPS,
    WIDTH,
    data,
    network,
    pruner,
    train,
)
from tests.oracle_movement import Straight


class Trace(L.Callback):
    def __init__(self, callback: MovementPruning) -> None:
        self.callback, self.masks, self.scores = callback, [], []

    def on_train_batch_end(self, *_: Any) -> None:
        self.masks.append({n: m.clone() for n, m in self.callback.masks.items()})
        self.scores.append({n: s.clone() for n, s in self.callback.scores.items()})


class Reference(nn.Module):
    """The block with masks in the graph: one score to a 4 x 4 block of ``query``, and a neuron."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        block = net[0]
        self.weights = nn.ParameterDict(
            {
                "q": block.query.weight,
                "qb": block.query.bias,
                "w": block.intermediate["dense"].weight,
                "wb": block.intermediate["dense"].bias,
                "o": block.output["dense"].weight,
                "ob": block.output["dense"].bias,
            }
        )
        self.head = net[1]
        self.blocks = nn.Parameter(torch.zeros(2, 2))
        self.neurons = nn.Parameter(torch.zeros(NEURONS))
        self.kept_blocks, self.kept_neurons = torch.ones(2, 2), torch.ones(NEURONS)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        spread = [
            t.repeat_interleave(4, 0).repeat_interleave(4, 1)
            for t in (self.blocks, self.kept_blocks)
        ]
        query = Straight.apply(w["q"], *spread)
        rows = self.kept_blocks.amax(1).repeat_interleave(4)
        x = x + nn.functional.linear(x, query, w["qb"] * rows).tanh()
        score, kept = self.neurons, self.kept_neurons
        into = Straight.apply(
            w["w"], score[:, None].expand(-1, WIDTH), kept[:, None].expand(-1, WIDTH)
        )
        out = Straight.apply(w["o"], score.expand(WIDTH, -1), kept.expand(WIDTH, -1))
        hidden = nn.functional.linear(x, into, w["wb"] * kept).tanh()
        return self.head(x + nn.functional.linear(hidden, out, w["ob"]))

    def prune(self, budget: int) -> None:
        """The lowest scores go until so many weights are gone."""
        units = [(float(s), 0, i, 16) for i, s in enumerate(self.blocks.detach().flatten())]
        units += [(float(s), 1, i, 2 * WIDTH) for i, s in enumerate(self.neurons.detach())]
        self.kept_blocks.fill_(1)
        self.kept_neurons.fill_(1)
        for _, kind, i, cost in sorted(units):
            if budget <= 0:
                break
            (self.kept_blocks.view(-1) if kind == 0 else self.kept_neurons)[i] = 0
            budget -= cost


def reference() -> tuple[Reference, list[Any]]:
    model = Reference(network())
    scores = [model.blocks, model.neurons]
    rest = [p for n, p in model.named_parameters() if n not in ("blocks", "neurons")]
    order = torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1)
    learn = torch.optim.Adam(scores, lr=1e-2)
    total = WIDTH * WIDTH + 2 * WIDTH * NEURONS
    x, y = data()
    seen = []
    for step in range(1, STEPS + 1):
        part = slice((step - 1) * BATCH, step * BATCH)
        order.zero_grad()
        learn.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        order.step()
        if step <= LAST:
            learn.step()
        if 3 <= step <= LAST:
            progress = (step - 3) / (LAST - 3)
            model.prune(round(SPARSITY * (1 - (1 - progress) ** 3) * total))
        seen.append(
            (model.kept_blocks.clone(), model.kept_neurons.clone(), model.neurons.detach().clone())
        )
    return model, seen


LEAD = "net.0.intermediate.dense.weight"


def test_every_step_is_that_of_shared_scores_in_the_graph():
    callback = pruner()
    trace = Trace(callback)
    module = train(callback, trace)
    model, expected = reference()
    returned, before = 0, None
    for masks, scores, (blocks, neurons, learned) in zip(
        trace.masks, trace.scores, expected, strict=True
    ):
        kept = neurons.bool()
        spread = blocks.bool().repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert torch.equal(masks["net.0.query.weight"], spread)
        assert torch.equal(masks["net.0.query.bias"], spread.any(1))
        assert torch.equal(masks[LEAD], kept[:, None].expand(-1, WIDTH))
        assert torch.equal(masks["net.0.intermediate.dense.bias"], kept)
        assert torch.equal(masks["net.0.output.dense.weight"], kept.expand(WIDTH, -1))
        assert "net.0.output.dense.bias" not in masks
        torch.testing.assert_close(scores[LEAD], learned, rtol=1e-5, atol=1e-6)
        returned += 0 if before is None else int((kept & ~before).sum())
        before = kept
    assert not before.all()
    assert returned > 0, "no neuron came back: nothing shows that pruned units learn"
    x = data()[0]
    torch.testing.assert_close(module.net(x), model(x), rtol=1e-5, atol=1e-5)
    net = module.net[0]
    assert (net.intermediate["dense"].bias[~before] == 0).all()
    assert (net.output["dense"].weight[:, ~before] == 0).all()
