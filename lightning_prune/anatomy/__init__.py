"""What a network is made of: units that are spread over several parameters."""

from lightning_prune.anatomy.ffn import FFN as FFN
from lightning_prune.anatomy.ffn import ffn_followers as ffn_followers
from lightning_prune.anatomy.ffn import find_ffn as find_ffn

__all__ = ["FFN", "ffn_followers", "find_ffn"]
