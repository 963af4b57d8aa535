"""What a recipe says besides the Trainer, the model and the data."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["OPTIONS", "add_options"]

OPTIONS = (
    *("output_dir", "compare_dense", "train_teacher", "scaling_law"),
    *("total_steps", "ckpt_path"),
)
"""Options that may be written with dashes as well."""


def add_options(parser: LightningArgumentParser) -> None:
    """Adds them to a command's parser."""
    parser.add_argument(
        "--output_dir",
        type=str,
        default="runs/latest",
        help="Folder for what fit leaves: the checkpoint, the report, two plots and, if all "
        "weights of the module are those of a transformers model, that model as stock "
        "transformers loads it. What an earlier run left there is replaced.",
    )
    parser.add_argument(
        "--compare_dense",
        type=bool,
        default=False,
        help="Whether fit trains the same once more without the pruning callbacks, and shows "
        "both results side by side.",
    )
    parser.add_argument(
        "--train_teacher",
        type=bool,
        default=False,
        help="Whether fit first trains the student of a DistillationModule by itself, without "
        "pruning, and makes it the teacher; it is kept in the folder teacher/model.",
    )
    parser.add_argument(
        "--scaling_law",
        type=str | None,
        default=None,
        help="A law as ScalingLaw.save writes it, for runs as long as this one: fit then "
        "reports which loss it predicts for the run's average parameter count.",
    )
