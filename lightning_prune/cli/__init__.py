"""The command line: `lightning-prune fit | validate | plan | report | sweep`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_prune._version import __version__

__all__ = ["main"]

# Nothing heavy is imported up here: --help and --version answer at once.

_NEEDED = ("jsonargparse", "docstring_parser", "rich")

_HELP = """\
Make networks sparse while they train.

commands:
  fit        train and prune what a YAML file describes, save the model, a report and two plots
  validate   measure a model, or a checkpoint of it, and show how sparse it is
  plan       tell, before any training, what fit would prune, what not and why, and when
  report     show how sparse a saved model is, layer by layer, and how fast (--latency)
  sweep      run fit for every cell of a grid, with baselines, and draw their Pareto plot

examples:
  lightning-prune plan --config examples/quickstart.yaml
  lightning-prune fit --config examples/quickstart.yaml
  lightning-prune fit --config examples/quickstart.yaml --trainer.max_epochs 1
  lightning-prune report runs/quickstart/model
  lightning-prune sweep examples/sparse_pretraining.yaml

Every key of the YAML file is an option as well: `lightning-prune fit --help` lists them. To see
what a class takes, name it after .help, as here:
  lightning-prune fit --model.help lightning_prune.tasks.SequenceClassification
  lightning-prune fit --trainer.callbacks.help lightning_prune.callbacks.GradualMagnitudePruning
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: What stands after `lightning-prune`; None for the arguments of this process.

    Returns:
        0; or 2 when what was asked for cannot be done, with one message on stderr.
    """
    given = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(
        prog="lightning-prune",
        usage="%(prog)s [--help] [--version] COMMAND ...",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "command",
        choices=("fit", "validate", "plan", "report", "sweep"),
        help=argparse.SUPPRESS,
    )
    if not given:
        parser.print_help()
        return 2
    # What stands after the command belongs to it, --help and all.
    command: str = parser.parse_args(given[:1]).command
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"lightning-prune: the command line needs {', '.join(missing)}: "
            "pip install 'lightning-prune[cli]'",
            file=sys.stderr,
        )
        return 2
    # A YAML file may name classes of the folder it is used in, as it may under `python -m`. Last,
    # so that nothing there hides an installed package.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    # A new head is what fine-tuning is about: no report that it is new. And where nothing can be
    # downloaded, no progress bar for what is read from the disk.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from lightning_prune.cli.commands import run

    return run(command, given[1:])
