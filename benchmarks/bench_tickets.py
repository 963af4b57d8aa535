"""Are there tickets? Iterative magnitude pruning with rewinding, and what it is held against.

    python benchmarks/bench_tickets.py [--only digits transformer]

90% of the weights are pruned in five rounds, on handwritten digits and in a small Transformer on
bytes of Python's standard library; 3 seeds. All arms but the dense one take the same number of
steps; the ticket, its values shuffled ("reinit") and a random mask train their last round from the
same step with the same schedule. Each arm's row is written as it ends; a run that is
started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import minilm
import small_digits
import small_llama
import stored
import torch

from lightning_prune import report
from lightning_prune.callbacks import GradualMagnitudePruning, LotteryTicket

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "tickets.jsonl"
SPARSITY, ROUNDS = 0.9, 5
ROUND = {"digits": 400, "transformer": 300}  # steps
REWIND = {"digits": 0.0, "transformer": 0.1}
METRICS = {"digits": "accuracy", "transformer": "loss"}
ARMS = {
    "dense": "one round, nothing pruned",
    "ticket": "LotteryTicket",
    "reinit": "the same, but initial values are shuffled within each tensor at every rewind",
    "random_mask": "the same, but which weights of a tensor go is drawn at random",
    "gradual": "GradualMagnitudePruning from 25 to 75% of as many steps, without rewinding",
}


def run(task: str, arm: str, seed: int) -> dict[str, Any]:
    L.seed_everything(seed, verbose=False)
    began = time.perf_counter()
    length, rewind = ROUND[task], REWIND[task]
    steps = length + ROUNDS * round(length * (1 - rewind))
    callbacks: list[L.Callback] = []
    if arm == "dense":
        steps = length
    elif arm == "gradual":
        callbacks = [GradualMagnitudePruning(SPARSITY)]
    else:
        control: Any = None if arm == "ticket" else arm
        callbacks = [
            LotteryTicket(SPARSITY, rounds=ROUNDS, rewind=rewind, control=control, seed=seed)
        ]
    row: dict[str, Any] = {"task": task, "arm": arm, "seed": seed, "steps": steps}
    if task == "digits":
        module, row["accuracy"] = small_digits.fit(callbacks, steps, seed)
    else:
        module = small_llama.language_model(64, layers=2)
        small_llama.fit(module, callbacks, steps, 8, seed)
        row["loss"] = small_llama.loss_of(module)
    row["zero"] = report(module).sparsity
    return row | {"seconds": round(time.perf_counter() - began), "machine": minilm.machine()}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Lottery tickets at 90%",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_tickets.py`",
        f"- digits: two hidden layers of 64, rounds of {ROUND['digits']} steps, rewound to the "
        "start; accuracy on images held out.",
        f"- transformer: Llama of 2 layers, 64 wide, bytes, rounds of {ROUND['transformer']} steps "
        f"of 8 x 128, rewound to {REWIND['transformer']:.0%} of a round; nats a byte.",
        *(f"- {arm}: {text}." for arm, text in ARMS.items()),
        "",
        *stored.by_seed(rows, METRICS, ARMS),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(ROUND))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = stored.load(STORE)
    for task in options.only:
        for seed in options.seeds:
            for arm in ARMS:
                wanted = {"task": task, "arm": arm, "seed": seed}
                if not any(wanted.items() <= row.items() for row in rows):
                    stored.add(run(task, arm, seed), rows, STORE, table)


if __name__ == "__main__":
    main()
