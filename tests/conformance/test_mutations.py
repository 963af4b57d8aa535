"""The suite's own test: every law, broken on purpose, is found; every check can fail."""

from __future__ import annotations

import pickle
from functools import partial

import pytest

from lightning_prune.errors import PruneError
from tests.conformance import laws  # noqa: F401  registers the checks
from tests.conformance import mutants_of_growth as growth
from tests.conformance import mutants_of_masks as masks
from tests.conformance import mutants_of_rounds as rounds
from tests.conformance import mutants_of_runs as runs
from tests.conformance import mutants_of_units as units
from tests.conformance.law_5_ranks import assert_refuses_drift, assert_row
from tests.conformance.registry import CHECKS, Case

MUTATIONS: dict[type, tuple[str, ...]] = {
    masks.KeepsMasksInBuffers: ("1-live", "1-checkpoints", "6-after_fit"),
    masks.RenamesInCheckpoints: ("1-checkpoints",),
    masks.PrunesOneTooMany: (
        "2-any_sparsity",
        "2-dtypes",
        "2-one_shot",
        "2-one_shot_before_any_step",
        "2-layer_adaptive_magnitude",
        "2-follows_the_schedule",
        "2-tiny_tensors",
        "3-limits",
        "9-two_callbacks",
    ),
    masks.CutsAtAThreshold: ("2-ties",),
    masks.ForgetsTheLastUpdate: ("2-follows_the_schedule",),
    masks.IgnoresWhatIsZero: ("2-zeros_go_first", "2-starts_from_the_model"),
    masks.IgnoresOptions: (
        "2-n_of_m",
        "2-whole_units",
        "2-allocations",
        "2-other_budgets",
        "2-chosen_by_name",
        "9-frozen_and_asked_for",
        "9-low_rank_adapters",
    ),
    masks.DoesNotLog: ("2-every_step_is_logged",),
    masks.DoesNotMaskAfterSteps: (
        "3-optimizers",
        "3-accumulation",
        "3-precisions",
        "3-limits",
        "3-manual_optimization",
        "3-manual_optimization_and_fractions",
        "3-stochastic_averages_and_fractions",
    ),
    masks.OnlyKeepsMasks: ("3-training_step_gives_nothing", "3-fast_dev_run", "2-any_sparsity"),
    masks.DoesNotProject: ("3-averages", "3-stochastic_averages"),
    masks.DoesNotProjectAtValidation: ("3-averages",),
    masks.DoesNotProjectCheckpoints: ("3-averages",),
    masks.DoesNotProjectAtTheEnd: ("3-averages",),
    masks.DoesNotProjectBeforeBatches: ("3-stochastic_averages",),
    masks.IsDenseDuringSteps: ("3-skipped_steps",),
    masks.SavesDenseWeights: ("3-checkpoints",),
    masks.CountsBatches: ("3-accumulation_keeps_masks_still",),
    masks.LetsPrunedGradientsCount: ("3-clipping", "9-clipping_with_two"),
    masks.BeginsAnew: ("3-second_fit", "8-another_model"),
    masks.DoesNotSqueeze: ("3-fast_dev_run",),
    masks.SpoilsValidation: ("3-other_stages",),
    masks.NamesWhatIsCompiled: ("3-compiled",),
    runs.SavesNoMasks: (
        "4-every_step",
        "4-adamw",
        "4-accumulation",
        "4-averages",
        "4-manual_optimization",
        "4-manual_optimization_of_known_length",
    ),
    runs.MakesUpForNothing: ("4-accumulation", "4-checkpoint_before_an_update"),
    runs.LooksAtTheRunTooEarly: ("4-fractions",),
    runs.TrustsTheTrainersCounter: ("4-skipped_steps", "4-manual_optimization"),
    runs.SavesWhatIsNotPlain: ("4-plain_contents",),
    runs.SavesViews: ("4-plain_contents",),
    runs.LeavesAHook: ("6-after_fit", "6-after_averaging", "6-after_a_failed_step"),
    runs.LeavesOptimizerHooks: ("6-after_fit",),
    runs.LeavesHooksOnErrors: ("6-after_an_exception",),
    runs.HoldsGradientsDown: ("6-after_fit", "6-the_network_stands_alone"),
    runs.AddsZero: (
        "7-sparsity_zero",
        "7-sparsity_zero_under_averages",
        "7-sparsity_zero_under_a_scaler",
        "7-sparsity_zero_under_manual_optimization",
        "7-before_it_begins",
    ),
    runs.DrawsFromGlobalChance: ("7-sparsity_zero", "7-before_it_begins"),
    runs.TakesAnything: (
        "8-sparsity",
        "8-window",
        "8-every",
        "8-schedule",
        "8-pattern",
        "8-pattern_and_sparsity",
        "8-allocation",
        "8-initial_sparsity",
        "8-others",
    ),
    runs.NeverRefuses: (
        "8-globs",
        "8-nothing_to_prune",
        "8-one_owner",
        "8-beyond_the_run",
        "8-too_few_steps",
        "8-too_few_steps_for_rounds",
        "8-unknown_length",
        "8-patterns_that_do_not_fit",
        "8-budgets_out_of_reach",
        "8-sparser_than_asked_for",
        "8-weights_that_are_not_finite",
        "8-another_checkpoint",
        "8-another_model",
        "8-the_other_package",
        "8-flattened_parameters",
        "8-steps_within_steps",
        "8-averages_after_ours",
        "8-a_run_that_stops_early",
    ),
    runs.RefusesLate: ("8-globs", "8-one_owner", "8-beyond_the_run", "8-averages_after_ours"),
    runs.SaysNothing: ("8-a_run_that_stops_early", "8-a_checkpoint_without_state"),
    runs.TakesAnyStateForTheLast: ("9-learning_rate_finder",),
    runs.TouchesOthersWeights: ("9-alone_or_together", "9-frozen_layers", "9-low_rank_adapters"),
}

MUTATIONS_OF_UNITS: dict[type, tuple[str, ...]] = {
    units.RenamesWhatItCuts: ("1-names_after_a_cut",),
    units.PrunesOneNeuronTooMany: ("2-units_of_any_sparsity",),
    units.IsLate: ("2-units_follow_the_schedule",),
    units.CutsHalf: ("2-units_cut",),
    units.CutsOthers: ("6-cut_as_masked",),
    units.ForgetsTheOptimizer: ("6-cut_as_masked",),
    units.TakesAnyUnits: ("8-units_that_cannot_go",),
    units.PrunesUnitsOfOthers: ("9-units_of_two_callbacks",),
}

MUTATIONS_OF_GROWTH: dict[type, tuple[str, ...]] = {
    growth.DynamicSparseGrowsOneMore: ("2-any_sparsity",),
    growth.DynamicSparseKeepsWhatItDrops: ("3-optimizers",),
    growth.DynamicSparseSavesNoGradients: ("4-checkpoint_before_an_update",),
    growth.DynamicSparseLeavesAverages: ("4-averages",),
}

MUTATIONS_OF_ROUNDS: dict[type, tuple[str, ...]] = {
    rounds.LotteryTicketSavesNoSnapshot: ("4-every_step", "4-accumulation"),
    rounds.LotteryTicketLeavesWhatComesBack: ("3-optimizers",),
    rounds.LotteryTicketRewindsAnyway: ("7-sparsity_zero",),
    rounds.LotteryTicketSavesNoCandidates: ("4-every_step",),
    rounds.LotteryTicketDrawsAsItComes: ("4-every_step",),
}

# What a check may end with: its own assertion, a refusal or none, or a file that cannot be read.
FOUND = (AssertionError, PruneError, pytest.fail.Exception, pickle.UnpicklingError)

PAIRS = [(Case(kind=kind), CHECKS[name]) for kind, names in MUTATIONS.items() for name in names]
PAIRS += [
    (units.unit_case(kind), CHECKS[name])
    for kind, names in MUTATIONS_OF_UNITS.items()
    for name in names
]
PAIRS += [
    (growth.growth_case(kind), CHECKS[name])
    for kind, names in MUTATIONS_OF_GROWTH.items()
    for name in names
]
PAIRS += [
    (rounds.rounds_case(kind), CHECKS[name])
    for kind, names in MUTATIONS_OF_ROUNDS.items()
    for name in names
]
BROKEN_RANKS = [(Case(kind=kind), row) for kind, row in runs.BROKEN_RANKS.items()]
BROKEN_RANKS += [(units.unit_case(kind), row) for kind, row in units.BROKEN_RANKS_OF_UNITS.items()]


@pytest.mark.parametrize(
    ("case", "check"), PAIRS, ids=[f"{case.name}-{check}" for case, check in PAIRS]
)
# A broken callback may rightly warn on its way.
@pytest.mark.filterwarnings("ignore")
def test_mutation_is_found(case, check, tmp_path):
    assert case.tries(str(check))
    assert case.excused(check) is None
    with pytest.raises(FOUND):
        check.run(case, tmp_path)


def test_every_check_can_fail():
    assert {str(check) for _, check in PAIRS} == set(CHECKS)


@pytest.mark.parametrize(
    ("case", "row"), BROKEN_RANKS, ids=[f"{case.name}-{row}" for case, row in BROKEN_RANKS]
)
def test_mutation_of_ranks_is_found(case, row, ranks, tmp_path):
    look = (
        assert_refuses_drift
        if row == "disturbed"
        else partial(assert_row, row=row, folder=tmp_path)
    )
    with pytest.raises(AssertionError):
        look(case, found=ranks)
