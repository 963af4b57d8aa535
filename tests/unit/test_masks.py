from __future__ import annotations

import io

import pytest
import torch

from lightning_prune.distributed import Shards
from lightning_prune.masks import MaskSet, pack, pruned_fraction, unpack, zero_fraction
from tests.refusals import refused
from tests.weights import targets


def some() -> MaskSet:
    return MaskSet(
        {"a": torch.tensor([[True, False], [True, True]]), "b": torch.zeros(3, dtype=torch.bool)}
    )


def test_entries_are_bits_from_the_lowest():
    mask = torch.tensor([True, False, False, True, False, False, False, False, False, True])
    assert pack(mask).tolist() == [0b00001001, 0b00000010]
    assert torch.equal(unpack(pack(mask), (2, 5)), mask.view(2, 5))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (8,), (3, 3)])
def test_all_shapes_can_be_packed(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    assert torch.equal(unpack(pack(mask), shape), mask)


def test_strides_do_not_matter():
    mask = torch.rand(4, 6) < 0.5
    assert torch.equal(unpack(pack(mask.t()), (6, 4)), mask.t())


def test_it_counts_what_is_kept():
    masks = some()
    assert (masks.kept("a"), masks.kept("b"), masks.size) == (3, 0, 7)
    assert masks.density == 3 / 7
    assert not masks.full("a")
    masks["a"] = torch.ones(2, 2, dtype=torch.bool)
    assert masks.full("a")
    assert masks.density == 4 / 7
    assert MaskSet({}).density == 1.0
    assert MaskSet({"none": torch.ones(0, dtype=torch.bool)}).density == 1.0


def test_names_keep_their_order():
    assert list(MaskSet({n: torch.ones(1, dtype=torch.bool) for n in "cab"})) == ["c", "a", "b"]


def test_a_mask_of_another_shape_or_dtype_is_refused():
    masks = some()
    with refused(where="a", got="(3,)", allowed="(2, 2)"):
        masks["a"] = torch.ones(3, dtype=torch.bool)
    with refused(where="b", got="torch.float32", allowed="torch.bool"):
        masks["b"] = torch.ones(3)
    with pytest.raises(KeyError):
        masks["c"] = torch.ones(3, dtype=torch.bool)
    assert masks.kept("a") == 3


def test_a_state_of_another_selection_is_refused():
    state = some().state_dict()
    with refused(where="b", got="1 selected weights without a mask"):
        some().load_state_dict({"a": state["a"]})
    with refused(where="c", got="1 masks without a weight"):
        some().load_state_dict({**state, "c": state["a"]})
    with refused(where="a", got="(3,)", allowed="(2, 2)"):
        some().load_state_dict({**state, "a": state["b"]})


def test_a_state_loads_safely_and_costs_a_bit_a_weight():
    mask = torch.rand(1000, 1000) < 0.5
    file = io.BytesIO()
    torch.save(MaskSet({"w": mask, "v": mask[:3]}).state_dict(), file)
    assert len(file.getvalue()) < 1_003_000 / 8 * 1.05
    file.seek(0)
    loaded = MaskSet({"w": torch.ones_like(mask), "v": torch.ones_like(mask[:3])})
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded["w"], mask)
    assert torch.equal(loaded["v"], mask[:3])


def test_loading_forgets_old_counts():
    masks = MaskSet({n: torch.ones_like(m) for n, m in some().items()})
    assert masks.density == 1.0
    masks.load_state_dict(some().state_dict())
    assert masks.density == 3 / 7


def test_fractions_are_of_all_selected_weights():
    chosen = targets(torch.tensor([[0.0, 2.0], [-0.0, 1.0]]), torch.ones(1, 6))
    masks = MaskSet(
        {"t0": torch.tensor([[True, False], [True, True]]), "t1": torch.zeros(1, 6).bool()}
    )
    assert pruned_fraction(masks, chosen, Shards()) == 0.7
    assert zero_fraction(chosen, Shards()) == 0.2
    assert zero_fraction([], Shards()) == 0.0
