"""Masks that are held as lines: rows or columns that go as a whole, in one entry each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_prune.masks import MaskSet, constant
from tests.refusals import refused


def held(masks: MaskSet) -> int:
    """Bytes."""
    return sum(mask.untyped_storage().nbytes() for mask in masks.values())


def rows(*kept: bool, width: int = 5) -> Tensor:
    return torch.tensor(kept).view(-1, 1).expand(-1, width)


def columns(*kept: bool, height: int = 3) -> Tensor:
    return torch.tensor(kept).view(1, -1).expand(height, -1)


@pytest.mark.parametrize("shape", [(3, 4), (7,), (2, 3, 4), (1, 1), (0, 3), ()])
def test_a_constant_mask_keeps_everything_in_one_byte(shape):
    mask = constant(shape)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert bool(mask.all())
    assert mask.untyped_storage().nbytes() == 1
    masks = MaskSet({"w": mask})
    assert masks.kept("w") == masks.size == mask.numel()
    assert masks.full("w")
    assert masks.density == 1.0


def test_a_mask_of_lines_is_held_and_counted_as_lines():
    masks = MaskSet({"w": constant((3, 5)), "v": constant((3, 4))})
    masks["w"] = rows(True, False, True)
    masks["v"] = columns(False, True, True, False)
    assert held(masks) == 3 + 4
    assert masks["w"].tolist() == [[True] * 5, [False] * 5, [True] * 5]
    assert masks["v"].tolist() == [[False, True, True, False]] * 3
    assert (masks.kept("w"), masks.kept("v")) == (10, 6)
    assert masks.density == 16 / 27
    assert not masks.full("w")


def test_setting_takes_a_copy_and_replaces():
    given = torch.tensor([True, False, True])
    masks = MaskSet({"w": constant((3, 5))})
    masks["w"] = given.view(-1, 1).expand(3, 5)
    given[0] = False
    assert masks.kept("w") == 10
    masks["w"] = rows(False, False, True)
    assert masks["w"].tolist() == [[False] * 5, [False] * 5, [True] * 5]
    assert masks.kept("w") == 5
    masks["w"] = constant((3, 5))
    assert masks.full("w")
    assert held(masks) == 1


def test_lines_of_one_dim_give_way_to_those_of_another_and_to_none():
    masks = MaskSet({"w": constant((3, 4))})
    masks["w"] = rows(True, False, True, width=4)
    masks["w"] = columns(True, False, False, True)
    assert masks["w"].tolist() == [[True, False, False, True]] * 3
    mixed = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    masks["w"] = mixed
    assert torch.equal(masks["w"], mixed)
    assert masks.kept("w") == int(mixed.sum())
    assert held(masks) == 12


def test_a_mask_of_lines_can_be_set_where_each_entry_was_held():
    masks = MaskSet({"w": torch.ones(3, 5, dtype=torch.bool)})
    masks["w"] = rows(True, False, True)
    assert masks["w"].tolist() == [[True] * 5, [False] * 5, [True] * 5]
    assert masks.kept("w") == 10
    assert held(masks) == 3


def test_masks_that_are_held_whole_are_written_in_place():
    masks = MaskSet({"w": torch.ones(3, 5, dtype=torch.bool)})
    before = masks["w"]
    masks["w"] = rows(True, False, True).contiguous()
    assert masks["w"] is before
    assert int(before.sum()) == 10


def test_shapes_are_compared_as_they_look():
    masks = MaskSet({"w": constant((3, 5))})
    with refused(where="w", got="(3, 1)", allowed="(3, 5)"):
        masks["w"] = torch.ones(3, 1, dtype=torch.bool)
    with refused(where="w", got="torch.float32"):
        masks["w"] = torch.ones(3, 1).expand(3, 5)


@pytest.mark.parametrize(
    ("mask", "size"),
    [
        (rows(True, False, True), 3),
        (columns(True, False, False, True), 4),
        (constant((3, 5)), 1),
        (torch.zeros(1, 1, dtype=torch.bool).expand(3, 5), 1),
        (torch.eye(4, dtype=torch.bool), 16),
        (rows(True, False, width=1), 2),
    ],
)
def test_a_state_has_every_entry_and_comes_back_as_lines(mask, size):
    masks = MaskSet({"w": constant(mask.shape)})
    masks["w"] = mask
    assert held(masks) == size
    state = masks.state_dict()
    assert state["w"]["shape"] == list(mask.shape)
    assert state["w"]["bits"].numel() == -(-mask.numel() // 8)
    loaded = MaskSet({"w": constant(mask.shape)})
    loaded.load_state_dict(state)
    assert torch.equal(loaded["w"], mask)
    assert loaded.kept("w") == int(mask.sum())
    assert held(loaded) == size
    assert torch.equal(loaded.state_dict()["w"]["bits"], state["w"]["bits"])


def test_a_state_of_lines_comes_back_whole_where_masks_are_held_whole():
    masks = MaskSet({"w": constant((3, 5))})
    masks["w"] = rows(True, False, True)
    loaded = MaskSet({"w": torch.ones(3, 5, dtype=torch.bool)})
    loaded.load_state_dict(masks.state_dict())
    assert torch.equal(loaded["w"], masks["w"])
    assert held(loaded) == 15


def test_what_both_keep_of_rows_and_columns():
    one, other = MaskSet({"w": rows(True, False, True)}), MaskSet({"w": constant((3, 5))})
    other["w"] = columns(True, True, False, True, False)
    both = one.intersect(other)
    assert both["w"].tolist() == [
        [True, True, False, True, False],
        [False] * 5,
        both["w"][0].tolist(),
    ]
    assert both.kept("w") == 6
