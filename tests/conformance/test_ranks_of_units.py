"""Units pruned by two processes: the same units, weights and small networks as by one."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.errors import PruneError
from tests.conformance.ranks_of_units import SCENES, run
from tests.conformance.watch import same_bits
from tests.refusals import refused


@pytest.mark.parametrize("scene", SCENES)
def test_two_processes_prune_as_one_does(scene, ranks, tmp_path):
    first, second = (rank["scenes of units"][scene] for rank in ranks)
    assert "error" not in first, first["trace"]
    assert same_bits(first, second), "ranks differ"
    found, alone = first["straight"], run(scene, folder=tmp_path)["straight"]
    assert any(not mask.all() for mask in found["masks"][8].values())
    assert same_bits(found["masks"], alone["masks"])
    assert found["removed"] == alone["removed"] is not None
    assert list(found["weights"]) == list(alone["weights"])
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scene", SCENES)
def test_two_processes_resume_as_if_they_had_not_stopped(scene, ranks):
    for rank in ranks:
        found = rank["scenes of units"][scene]
        straight, resumed = found["straight"], found["resumed"]
        assert list(resumed["masks"]) == [6, 7, 8, 9, 10]
        for step, masks in resumed["masks"].items():
            assert same_bits(masks, straight["masks"][step]), f"step {step}"
        assert same_bits(resumed["weights"], straight["weights"])
        assert resumed["removed"] == straight["removed"]


@pytest.mark.parametrize(
    ("scene", "what", "got", "fix"),
    [
        ("early", "in the middle of this run", "DDPStrategy", "write compact=True"),
        ("layers", "waits for the gradients", "['layers']", "find_unused_parameters_true"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(scene, what, got, fix, ranks):
    for rank in ranks:
        seen = rank["scenes of units"][scene]
        with refused(what=what, got=got, fix=fix):
            raise PruneError(seen["error"])
        assert "epoch_loop.run" not in seen["trace"], "refused after batches have begun"
