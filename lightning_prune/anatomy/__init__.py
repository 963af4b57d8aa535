"""What a network is made of: units that are spread over several parameters."""

from lightning_prune.anatomy.activations import ActivationImportance as ActivationImportance
from lightning_prune.anatomy.calibration import calibrate as calibrate
from lightning_prune.anatomy.counting import Counter as Counter
from lightning_prune.anatomy.ffn import FFN as FFN
from lightning_prune.anatomy.ffn import ffn_followers as ffn_followers
from lightning_prune.anatomy.ffn import find_ffn as find_ffn
from lightning_prune.anatomy.graph import graph_anatomy as graph_anatomy
from lightning_prune.anatomy.kinds import KINDS as KINDS
from lightning_prune.anatomy.kinds import STREAM_SLICES as STREAM_SLICES
from lightning_prune.anatomy.kinds import Kind as Kind
from lightning_prune.anatomy.macs import macs_of as macs_of
from lightning_prune.anatomy.scores import unit_scores as unit_scores
from lightning_prune.anatomy.scores import unit_sizes as unit_sizes
from lightning_prune.anatomy.survey import survey as survey
from lightning_prune.anatomy.units import Anatomy as Anatomy
from lightning_prune.anatomy.units import Block as Block
from lightning_prune.anatomy.units import Group as Group
from lightning_prune.anatomy.units import Part as Part
from lightning_prune.anatomy.units import Site as Site

__all__ = [
    "FFN",
    "KINDS",
    "STREAM_SLICES",
    "ActivationImportance",
    "Anatomy",
    "Block",
    "Counter",
    "Group",
    "Kind",
    "Part",
    "Site",
    "calibrate",
    "ffn_followers",
    "find_ffn",
    "graph_anatomy",
    "macs_of",
    "survey",
    "unit_scores",
    "unit_sizes",
]
