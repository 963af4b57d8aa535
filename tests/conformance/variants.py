"""More rows of one class, with other arguments and networks, and what is asked of them."""

from __future__ import annotations

from typing import Any

from tests.conformance.lora_toy import LoRAToy, LoRAUnits
from tests.conformance.units import Units

__all__ = ["AT_ONCE", "CHANNELS", "DECIDED", "MOVING", "ROUNDS", "VARIANTS"]

_SPLIT = "Units over several weights are not put together from shards: refused"
_CUT = "After the cut no mask is left to look at: see units that are not cut, and"
_MORE = "tests/trainer/test_structured.py and test_ranks_of_units.py"


def _units(variant: str, only: tuple[str, ...], why: str, **changed: Any) -> dict[str, Any]:
    """A row with heads and neurons, and more arguments."""
    plain = {"sparsity": 0.5, "start": 2, "end": 8, "every": 2, "units": ["heads", "ffn"]}
    return {
        "variant": variant,
        "defaults": plain | changed,
        "model": Units,
        "laws": {"5-fsdp2": _SPLIT},
        "only": only,
        "why": f"{why} {_MORE}",
    }


_OF_LORA = "Only what units are, and their scores, is new beside single weights; see"
_OF_CUTS = ("1-names_after_a_cut", "2-units_cut", "6-cut_as_masked")

_DECIDED = (
    "1-live",
    "2-units_of_any_sparsity",
    "3-accumulation",
    "3-checkpoints",
    "3-skipped_steps",
    "4-accumulation",
    "4-checkpoint_before_an_update",
    "4-every_step",
    "4-plain_contents",
    "4-skipped_steps",
    "5-ddp",
    "5-ddp, accumulation, clipping",
    "6-after_a_failed_step",
    "6-after_an_exception",
    "6-after_fit",
    "7-before_it_begins",
    "7-sparsity_zero",
    "8-beyond_the_run",
    "8-units_that_cannot_go",
    "8-window",
)
_SMALL = {"sparsity": 0.5, "units": ["heads", "ffn"], "learn_from": "train", "compact": False}
DECIDED: dict[str, Any] = {
    "defaults": _SMALL | {"start": 2, "end": 8, "every": 2, "merge": False},
    "only": _DECIDED,
    "why": "Masks are those of units, made once, and decisions learn from the mean of all ranks; "
    "see GradualMagnitudePruning, units, and test_all_in_one.py",
}
AT_ONCE: dict[str, Any] = {
    "defaults": _SMALL | {"at": 4, "batches": 2},
    "only": tuple(
        name
        for name in _DECIDED
        if name not in ("7-before_it_begins", "8-beyond_the_run", "8-window")
    ),
    "why": "Masks are those of units, made once, by scores that are the mean of all ranks; see "
    "GradualMagnitudePruning, units, and test_one_shot.py",
}

# Of channels, which are always cut out in the end.
CHANNELS: dict[str, Any] = {
    "defaults": {"sparsity": 0.5, "start": 2, "end": 8, "compact": True},
    "model": Units,
    "only": (
        "1-checkpoints",
        "1-names_after_a_cut",
        "3-accumulation_keeps_masks_still",
        "3-checkpoints",
        "3-fast_dev_run",
        "3-other_stages",
        "4-accumulation",
        "4-adamw",
        "4-checkpoint_before_an_update",
        "4-every_step",
        "4-fractions",
        "4-plain_contents",
        "4-skipped_steps",
        "5-ddp",
        "5-ddp, accumulation, clipping",
        "7-before_it_begins",
        "7-sparsity_zero",
        "7-sparsity_zero_under_a_scaler",
        "8-a_run_that_stops_early",
        "8-averages_after_ours",
        "8-beyond_the_run",
        "8-steps_within_steps",
    ),
    "why": "After the cut no mask is left to look at; see "
    "tests/trainer/test_pruning_aware_tuning.py",
}

# Of masks whose zeros move; `static` is looked at where these say why not.
_GROWN = "Grown weights start at zero: see the static variant, whose mask stays"
MOVING: dict[str, Any] = {
    "laws": {"2-zeros_go_first": _GROWN, "9-alone_or_together": _GROWN},
}

# Of rounds: updates after steps 4 and 7 of the 10, and a rewind to step 1.
_ALONE = "A rewind takes the whole network back: refused beside another pruning callback"
_MIXED = "Stochastic averages would mix weights from before and after a rewind: refused"
_COUNTED = "Rounds are laid onto a run of known length: see the variant with total_steps"
_TICKET = {"sparsity": 0.5, "rounds": 2, "rewind": 1}
ROUNDS: dict[str, Any] = {
    "defaults": _TICKET,
    "laws": {
        "3-manual_optimization": _COUNTED,
        "3-stochastic_averages": _MIXED,
        "4-manual_optimization": _COUNTED,
        "8-one_owner": _ALONE,
        "9-alone_or_together": _ALONE,
        "9-clipping_with_two": _ALONE,
        "9-two_callbacks": _ALONE,
    },
}
_STATE = (
    "1-live",
    "2-any_sparsity",
    "3-accumulation",
    "3-optimizers",
    "4-accumulation",
    "4-checkpoint_before_an_update",
    "4-every_step",
    "4-plain_contents",
    "4-skipped_steps",
    "5-ddp",
    "5-fsdp2, resumed",
    "6-after_an_exception",
    "6-after_fit",
    "7-sparsity_zero",
)
_BESIDE = "Rounds are those of LotteryTicket; what is new is what is drawn and what is saved"

# By the class's name.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "AllInOnePruning": [DECIDED | {"variant": "without adapters", "model": Units}],
    "OneShotPruning": [AT_ONCE | {"variant": "without adapters", "model": Units}],
    "DynamicSparseTraining": [
        MOVING
        | {
            "variant": "gradient",
            "defaults": {
                "sparsity": 0.5,
                "start": 2,
                "end": 8,
                "every": 2,
                "grow": "gradient",
            },
        },
        {
            "variant": "static",
            "defaults": {"sparsity": 0.5, "start": 2, "drop_fraction": 0.0},
            "only": (
                "2-zeros_go_first",
                "3-optimizers",
                "4-every_step",
                "7-sparsity_zero",
                "9-alone_or_together",
            ),
            "why": "The mask is drawn once, as in the first update of DynamicSparseTraining",
        },
    ],
    "GradualMagnitudePruning": [
        _units(
            "units",
            (
                "1-live",
                "2-every_step_is_logged",
                "2-units_follow_the_schedule",
                "2-units_of_any_sparsity",
                "3-accumulation",
                "3-checkpoints",
                "3-skipped_steps",
                "4-plain_contents",
                "5-ddp",
                "5-ddp, accumulation, clipping",
                "5-disturbed",
                "5-fsdp2",
                "6-after_fit",
                "7-before_it_begins",
                "8-units_that_cannot_go",
                "8-weights_that_are_not_finite",
                "9-units_of_two_callbacks",
            ),
            "Masks are applied and counted as those of single weights are, looked at there; see",
        ),
        _units(
            "activation",
            (
                "2-units_of_any_sparsity",
                "3-accumulation",
                "4-checkpoint_before_an_update",
                "4-plain_contents",
                "5-ddp",
                "6-after_an_exception",
                "6-after_fit",
            ),
            "Only what is seen of activations is new; see",
            criterion="activation",
        ),
        _units("cut", _OF_CUTS, _CUT, compact=True),
        _units("early", _OF_CUTS, _CUT, compact="early"),
    ],
    "HardConcretePruning": [
        _units(
            "under LoRA",
            (
                "1-live",
                "2-units_of_any_sparsity",
                "3-accumulation",
                "3-checkpoints",
                "3-skipped_steps",
                "4-accumulation",
                "4-checkpoint_before_an_update",
                "4-plain_contents",
                "5-ddp",
                "5-ddp, accumulation, clipping",
                "6-after_an_exception",
                "6-after_fit",
                "7-before_it_begins",
                "7-sparsity_zero",
                "8-units_that_cannot_go",
            ),
            "Only what gates learn from is new beside weights that train, and that is the mean of "
            "all ranks, so that masks agree where weights do not; see HardConcretePruning,",
        )
        | {"model": LoRAUnits},
        _units(
            "cut under LoRA",
            ("2-units_cut",),
            "Adapters and their names are gone after the cut; see test_gates_under_lora.py, and",
            compact=True,
        )
        | {"model": LoRAUnits},
    ],
    "LoRAPruning": [
        _units(
            "units",
            (
                "1-live",
                "2-every_step_is_logged",
                "2-units_follow_the_schedule",
                "2-units_of_any_sparsity",
                "3-accumulation",
                "3-averages",
                "3-checkpoints",
                "3-skipped_steps",
                "4-adamw",
                "4-checkpoint_before_an_update",
                "4-plain_contents",
                "5-ddp",
                "5-ddp, accumulation, clipping",
                "5-disturbed",
                "5-fsdp2",
                "6-after_an_exception",
                "6-after_fit",
                "7-before_it_begins",
                "7-sparsity_zero",
                "8-units_that_cannot_go",
                "8-weights_that_are_not_finite",
                "9-units_of_two_callbacks",
            ),
            _OF_LORA,
            merge=False,
            spare_last=0,
        )
        | {"model": LoRAUnits, "laws": {}},
        {
            "variant": "merged",
            "defaults": {"sparsity": 0.5, "start": 2, "end": 8, "every": 2}
            | {"units": None, "allocation": "global"},
            "model": LoRAToy,
            "only": (
                "2-any_sparsity",
                "2-n_of_m",
                "3-accumulation",
                "3-optimizers",
                "3-precisions",
                "3-skipped_steps",
                "4-checkpoint_before_an_update",
                "4-every_step",
                "4-plain_contents",
            ),
            "why": "Only names change when the fit ends; see LoRAPruning, and test_lora_pruning.py",
        },
    ],
    "LotteryTicket": [
        {
            "variant": "by hand",
            "defaults": _TICKET | {"total_steps": 4},
            "only": ("3-manual_optimization", "4-manual_optimization"),
            "why": "Only the count of steps is new: the slower of two optimizers makes four",
        },
        {
            "variant": "reinit",
            "defaults": _TICKET | {"control": "reinit"},
            "only": _STATE,
            "why": _BESIDE,
        },
        {
            "variant": "random masks",
            "defaults": _TICKET | {"control": "random_mask"},
            "only": (*_STATE, "2-n_of_m", "2-whole_units", "2-ties"),
            "why": _BESIDE,
        },
        {
            # the sixth mask settles it, four steps before the round's end
            "variant": "early bird",
            "defaults": {"sparsity": 0.5, "rounds": 1, "early_bird": 0.9, "every": 1}
            | {"total_steps": 20},
            "only": (
                "1-live",
                "3-optimizers",
                "4-every_step",
                "4-plain_contents",
                "4-skipped_steps",
                "5-ddp",
                "5-fsdp2, resumed",
                "6-after_an_exception",
                "6-after_fit",
                "7-sparsity_zero",
            ),
            "why": f"{_BESIDE}; shorter runs have no six masks, see test_lottery_ticket_fits.py",
        },
    ],
    "PruningAwareTuning": [
        CHANNELS
        | {
            "variant": "under LoRA",
            "model": LoRAUnits,
            "only": tuple(set(CHANNELS["only"]) - {"1-names_after_a_cut"}),
        },
    ],
}
