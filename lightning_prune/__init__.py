"""Make networks sparse while they train: a PyTorch Lightning plugin."""

from lightning_prune._version import __version__ as __version__

__all__ = ["__version__"]
