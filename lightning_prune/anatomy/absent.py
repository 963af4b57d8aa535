"""What stands where a sub-layer was."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Nothing", "is_absent"]


class Nothing(nn.Module):
    """Stands where a sub-layer was: gives a zero that any tensor can be added to.

    Args:
        pair: Whether to give (zero, None), as attentions do.
    """

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, *given: object, **named: object) -> Tensor | tuple[Tensor, None]:
        """Gives zero, on the device and in the dtype of the first tensor it gets."""
        x = next(v for v in (*given, *named.values()) if isinstance(v, Tensor))
        zero = x.new_zeros(())
        return (zero, None) if self.pair else zero


def is_absent(layer: nn.Module, path: str) -> bool:
    """Whether nothing is left at a path, or around it, in a layer."""
    module: object = layer
    for name in path.split("."):
        module = getattr(module, name, None)
        if isinstance(module, Nothing):
            return True
    return False
