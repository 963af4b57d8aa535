"""What Lightning says that nobody needs to read."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["quieten"]


def quieten() -> None:
    """Leaves out what Lightning says of devices, seeds and folders that are as they should be."""
    # Lightning 2.6 calls jsonargparse in a way that is about to be retired.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        # A later run replaces what an earlier one left: so --output_dir says.
        "Checkpoint directory .* exists and is not empty",
        "Experiment logs directory .* exists and is not empty",
        # Our data is in memory, tokenised: workers would slow it down.
        "The '.*_dataloader' does not have many workers",
        # Of torch's own pytree, called by Lightning.
        "`isinstance.treespec, LeafSpec.` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
