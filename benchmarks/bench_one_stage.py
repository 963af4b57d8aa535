"""Experiment 9: pruned while LoRA tunes, or before, or after; on two domains.

    python benchmarks/bench_one_stage.py --data PATH [--only minilm:atp:0.4 smollm2 ...]

minilm: SST-2, 500 steps of 32 sentences; accuracy on the dev set. smollm2: SmolLM2-135M on
PubMedQA, 150 steps of 512 tokens; perplexity on questions that were held out. All arms put LoRA of
rank 8 on the Linears of the blocks, see the same batches in the same order at the same rate, and
remove the same share of the block weights, heads and FFN neurons, wherever they choose (PAT:
channels of the stream); what is measured are merged and cut models. Arms that decide on held-out
batches get those in addition to the steps. Each arm's row is written as it ends; a run that is
started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import minilm
import stored
import torch
from bench_quality import BATCH, Classifier, accuracy, encode, training_batches
from bench_small_llm import LENGTH, MODEL, dense, loss_of
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune import lora
from lightning_prune.callbacks import (
    AllInOnePruning,
    HardConcretePruning,
    LoRAPruning,
    OneShotPruning,
    PruningAwareTuning,
)
from lightning_prune.targets import select
from lightning_prune.tasks import CausalLM
from lightning_prune.tasks.adapters import add_lora
from lightning_prune.tasks.pretrained import named_tokenizer

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "one_stage.jsonl"
ADAPTERS = {"r": 8, "lora_alpha": 16}
LEVELS = (0.25, 0.4)
STEPS = {"minilm": 500, "smollm2": 150}
RATES = {"minilm": 2e-3, "smollm2": 1e-3}
HELD_OUT = 32  # batches that generators learn from, over and over
UNITS = ["heads", "ffn"]
ARMS = {
    "dense": "LoRA alone",
    "before": "OneShotPruning(at=0.0): one shot by 16 batches' Taylor scores, then LoRA",
    "after": "LoRA, then OneShotPruning(at=1.0)",
    "LoRAPrune": "LoRAPruning, from 10% to 90%",
    "L0": "HardConcretePruning, from 5% to 70%, ramp 0.6 (Compresso)",
    "atp": "AllInOnePruning, its defaults",
    "pat": "PruningAwareTuning, its defaults: channels of the stream, and no heads and neurons",
    "atp's units": "what AllInOnePruning has chosen in another run of the seed is cut, then LoRA",
}
FIXED = ("minilm", "atp's units", 0.4)  # what choosing costs, apart from what is chosen
Batch = dict[str, Tensor]


class Adapted(Classifier):
    """MiniLM with LoRA on the Linears of its encoder; pooler and head learn in full."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        add_lora(self.model, ADAPTERS, head=True)
        for parameter in self.model.bert.pooler.parameters():
            parameter.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=self.rate, fused=True)
        steps = STEPS["minilm"]
        warm = round(0.06 * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / warm, max(0.0, (steps - s) / (steps - warm)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class GivenUnits(OneShotPruning):
    """Cuts what it is told to cut."""

    def __init__(self, kept: dict[str, Tensor], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.given = kept

    def _scores(self, trainer: L.Trainer, module: L.LightningModule, layout: Any) -> Any:
        return {group.name: self.given[group.name].double() for group in layout.groups}


def pruner(arm: str, sparsity: float, seed: int) -> list[L.Callback]:
    if arm == "dense":
        return []
    if arm == "pat":
        return [PruningAwareTuning(sparsity, seed=seed)]
    common: dict[str, Any] = {"sparsity": sparsity, "units": UNITS, "compact": True}
    if arm == "LoRAPrune":
        return [LoRAPruning(**common, spare_first=0, spare_last=0)]
    if arm in ("before", "after"):
        return [OneShotPruning(**common, at=float(arm == "after"))]
    if arm == "L0":
        return [HardConcretePruning(**common, start=0.05, end=0.7, ramp=0.6, seed=seed)]
    return [AllInOnePruning(**common, seed=seed)]


def held_out_sentences(path: Path) -> list[Batch]:
    """Training sentences that `training_batches` left out."""
    texts, labels = minilm.sst2(path, "train")
    chosen = set(random.Random(1234).sample(range(len(texts)), 16_000))
    rest = [i for i in range(len(texts)) if i not in chosen][: HELD_OUT * BATCH]
    rest.sort(key=lambda i: len(texts[i]))
    groups = [rest[i : i + BATCH] for i in range(0, len(rest), BATCH)]
    random.Random(0).shuffle(groups)
    tokenizer = minilm.tokenizer()
    return [encode(tokenizer, [texts[i] for i in g], [labels[i] for i in g]) for g in groups]


def questions(path: Path) -> dict[str, list[Batch]]:
    """PubMedQA as packed rows of LENGTH tokens: to train on, to decide on, to measure on."""
    found = json.loads((path / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    tokenizer = named_tokenizer(MODEL)
    texts = [
        f"{' '.join(q['CONTEXTS'])}\nQuestion: {q['QUESTION']}\nAnswer: {q['LONG_ANSWER']}"
        for q in found.values()
    ]
    random.Random(0).shuffle(texts)
    split: dict[str, list[Batch]] = {}
    sizes = {"test": 32, "validation": HELD_OUT, "train": STEPS["smollm2"]}
    start = 0
    for name, many in sizes.items():
        ids: list[int] = []
        while len(ids) < many * LENGTH and start < len(texts):
            ids += [*tokenizer(texts[start])["input_ids"], tokenizer.eos_token_id]
            start += 1
        rows = torch.tensor(ids)[: many * LENGTH].split(LENGTH)
        split[name] = [{"input_ids": x[None], "labels": x[None].clone()} for x in rows]
    return split


def fit(
    module: L.LightningModule,
    train: list[Batch],
    held_out: list[Batch],
    callbacks: list[L.Callback],
) -> None:
    trainer = L.Trainer(
        max_steps=len(train),
        callbacks=callbacks,
        precision="bf16-mixed",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1000,  # the loader is for decisions alone
    )
    trainer.fit(module, DataLoader(train, batch_size=None), DataLoader(held_out, batch_size=None))


def run(name: str, arm: str, sparsity: float, seed: int, options: Any) -> dict[str, Any]:
    began = time.perf_counter()
    callbacks = pruner(arm, sparsity, seed)
    if arm == FIXED[1]:
        common: dict[str, Any] = {"sparsity": sparsity, "units": UNITS, "allocation": "global"}
        chosen = AllInOnePruning(sparsity, units=UNITS, seed=seed)
        trained(name, [chosen], seed, options)
        callbacks = [GivenUnits(chosen._kept, at=0.0, **common)]
    module, blocks, test = trained(name, callbacks, seed, options)
    row = {
        "network": name,
        "arm": arm,
        "sparsity": sparsity,
        "seed": seed,
        "steps": STEPS[name],
        "rate": RATES[name],
        "removed": 1 - block_weights(module) / blocks,
        "residual": residual(callbacks),
    }
    if name == "minilm":
        row["accuracy"] = accuracy(module, options.data)
    else:
        row["loss"] = loss_of(module.model, test)
    seconds = round(time.perf_counter() - began)
    return row | {"seconds": seconds, "machine": minilm.machine()}


def trained(
    name: str, callbacks: list[L.Callback], seed: int, options: Any
) -> tuple[Any, int, list[Batch]]:
    """A network that was tuned and merged, its block weights before, and what it is measured on."""
    L.seed_everything(seed, verbose=False)
    test: list[Batch] = []
    if name == "minilm":
        module: Any = Adapted(RATES[name])
        train = training_batches(options.data, seed)[: STEPS[name]]
        held_out = held_out_sentences(options.data)
    else:
        module = CausalLM(
            model=dense(), adapters=ADAPTERS, learning_rate=RATES[name], weight_decay=0.0
        )
        split = questions(options.data)
        train, held_out, test = split["train"], split["validation"], split["test"]
    module.validation_step = lambda batch, index: None
    blocks = block_weights(module)
    fit(module, train, held_out, callbacks)
    if any(".lora_" in n for n, _ in module.named_parameters()):
        lora.merge(module, dense=True)
    module.float()
    return module, blocks, test


def residual(callbacks: list[L.Callback]) -> float | None:
    """The joint norm of what adapters still held for the units that went."""
    found = [c.residual for c in callbacks if isinstance(c, AllInOnePruning)]
    if not found:
        return None
    return math.sqrt(sum(float(x.double().square().sum()) for x in found[0].values()))


def block_weights(module: Any) -> int:
    """All weights of Linears in the blocks."""
    layers = [n for n, _ in module.named_modules() if n.endswith(("encoder.layer", "model.layers"))]
    chosen = select(module, [f"{layers[0]}*"], frozen=True).targets
    return sum(t.size for t in chosen if ".lora_" not in t.name)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# One stage or two: pruning while LoRA tunes, before, and after",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_one_stage.py --data PATH`",
        "- LoRA of rank 8 on all Linears of the blocks, bf16-mixed; merged and cut models.",
        "- Kept: (pruned - chance) / (dense - chance) of accuracy, the mean of seeds; of nats a "
        "token, dense / pruned.",
        "- In the paper (ATP): 88 to 91% of the dense model's quality at 40%.",
        *(f"- {arm}: {text}." for arm, text in ARMS.items()),
        "",
        "| network | removed | arm | quality (each seed) | kept | residual of adapters |",
        "|---" * 6 + "|",
    ]
    order = list(ARMS)
    keys = sorted({(r["network"], r["sparsity"], order.index(r["arm"]), r["arm"]) for r in rows})
    for network, sparsity, _, arm in keys:
        some = [
            r for r in rows if (r["network"], r["sparsity"], r["arm"]) == (network, sparsity, arm)
        ]
        whole = [r for r in rows if (r["network"], r["arm"]) == (network, "dense")]
        few = network == "minilm"
        value = "accuracy" if few else "loss"
        each = [r[value] for r in sorted(some, key=lambda r: r["seed"])]
        shown = [f"{x:.4f}" if few else f"{math.exp(x):.2f}" for x in each]
        kept = "-"
        if whole:
            best = mean(r[value] for r in whole)
            kept = f"{(mean(each) - 0.5) / (best - 0.5) if few else best / mean(each):.1%}"
        left = some[0]["residual"]
        lines.append(
            f"| {network} | {mean(r['removed'] for r in some):.1%} | {arm} | {', '.join(shown)} | "
            f"{kept} | {'-' if left is None else f'{left:.3g}'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[], help="'smollm2', or 'minilm:atp:0.4'")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    arms = [(name, "dense", 0.0) for name in STEPS]
    plain = [arm for arm in ARMS if arm not in ("dense", FIXED[1])]
    arms += [*((n, arm, level) for n in STEPS for level in LEVELS for arm in plain), FIXED]
    rows = stored.load(STORE)
    for seed in options.seeds:
        for name, arm, level in arms:
            if options.only and not {name, f"{name}:{arm}:{level:g}"} & set(options.only):
                continue
            wanted = {"network": name, "arm": arm, "sparsity": level, "seed": seed}
            if any(wanted.items() <= row.items() for row in rows):
                continue
            row = run(name, arm, level, seed, options)
            stored.add(row, rows, STORE, table)


if __name__ == "__main__":
    main()
