"""Models to disk and back."""

from __future__ import annotations

from lightning_prune.export.onnx import export_onnx as export_onnx
from lightning_prune.export.saving import MANIFEST as MANIFEST
from lightning_prune.export.saving import SavesPretrained as SavesPretrained
from lightning_prune.export.saving import from_pretrained as from_pretrained
from lightning_prune.export.saving import save_pretrained as save_pretrained
from lightning_prune.export.task_masks import load_mask as load_mask
from lightning_prune.export.task_masks import save_mask as save_mask

__all__ = [
    "MANIFEST",
    "SavesPretrained",
    "export_onnx",
    "from_pretrained",
    "load_mask",
    "save_mask",
    "save_pretrained",
]
