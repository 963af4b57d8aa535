"""What is left of networks that were pruned while they were tuned: budgets, merges, cuts."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

import lightning_prune
from lightning_prune import lora
from lightning_prune.anatomy import survey
from lightning_prune.removal import removals_of
from tests import oracle_lora as naive
from tests.adapted import Module, empty_units
from tests.conformance.watch import copied, same_bits, weights
from tests.one_stage import Before, atp, fit, held_out, said
from tests.structured import Module as Whole
from tests.structured import bert, llama

# Of one head (with its queries) and one neuron in a layer: the weights that are counted.
COSTS = {"llama": {"heads": 384, "ffn": 48}, "bert": {"heads": 512, "ffn": 32}}
MANY = {"llama": {"heads": 2, "ffn": 24}, "bert": {"heads": 2, "ffn": 24}}


def assert_exact(net: Any, name: str, units: list[str], sparsity: float) -> None:
    """Enough is gone, and of what went nothing could come back."""
    gone = {k: len(v) for k, v in empty_units(net, units).items()}
    cost = {k: COSTS[name][k.rpartition(".")[2]] for k in gone}
    total = sum(2 * MANY[name][kind] * COSTS[name][kind] for kind in units)
    left = total - sum(gone[k] * cost[k] for k in gone)
    assert left <= (1 - sparsity) * total + 1e-6
    smallest = min(cost[k] for k in gone if gone[k])
    assert left + smallest > (1 - sparsity) * total, f"{left} of {total}"


@pytest.mark.parametrize("units", [["heads", "ffn"], ["ffn"]], ids="-".join)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.65])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_as_many_go_as_were_asked_for_to_one_unit(name, sparsity, units):
    module = Module(name)
    callback = atp(sparsity=sparsity, units=units, compact=False)
    trainer = fit(module, callback)
    assert_exact(module, name, units, sparsity)
    assert callback.finished
    zeros = sum(int((weights(module)[n] == 0).sum()) for n in selected(callback, module))
    total = sum(weights(module)[n].numel() for n in selected(callback, module))
    assert float(trainer.callback_metrics["sparsity/actual"]) == pytest.approx(zeros / total)


def selected(callback: Any, module: Any) -> list[str]:
    return [t.name for t in callback.selection(module).targets]


@pytest.mark.parametrize("units", ["query_heads", "head_dims"])
def test_other_kinds_of_units(units):
    module, before = Module("llama"), Before()
    callback = atp(sparsity=0.25, units=units)
    train_and_compare(module, before, callback, "llama")
    config = survey(module.net, stream=False).blocks[0]
    assert (config.heads, config.width) != (4, 4)


def train_and_compare(module: Any, before: Before, callback: Any, name: str, **given: Any) -> None:
    trainer = fit(module, callback, before, **given)
    expected, found = said(before.net, name), said(module.net, name)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
    hooks = [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert trainer.global_step == 10


@pytest.mark.parametrize("regularizer", ["proximal", "lasso", "none"])
@pytest.mark.parametrize(
    ("compact", "merge"), [(True, True), (True, False), (False, False)], ids=str
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_cut_says_what_was_trained(name, compact, merge, regularizer):
    module, before = Module(name), Before()
    full = sum(p.numel() for p in module.parameters())
    callback = atp(compact=compact, merge=merge, regularizer=regularizer)
    train_and_compare(module, before, callback, name)
    adapters = [n for n, _ in module.named_parameters() if "lora_" in n]
    assert bool(adapters) != merge
    assert (removals_of(module) is not None) == compact
    assert (sum(p.numel() for p in module.parameters()) < full) == compact
    if compact:
        assert not any(callback.masks.values())
    if compact and not merge:
        rows = lora.lora_layers(module)
        widths = {row.weight.shape for row in rows}
        for row in rows:
            a, b = row.matrices("default")
            shape = row.weight.shape[::-1] if row.fan_in_fan_out else row.weight.shape
            assert (b.shape[0], a.shape[1]) == tuple(shape), row.weight_name
        assert len(widths) > 2
        merged = lora.merge(module.net)
        torch.testing.assert_close(said(merged, name), said(before.net, name), rtol=1e-4, atol=1e-5)


def test_what_was_cut_under_its_adapters_trains_on():
    module = Module("llama")
    fit(module, atp(merge=False))
    before = copied(weights(module))
    fit(module)
    moved = {n for n, p in weights(module).items() if not same_bits(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}


class Norms(L.Callback):
    """The joint norms of units in adapters after the step at which units go; stands first."""

    def __init__(self, at: int) -> None:
        self.at, self.found = at, {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self.at or self.found:
            return
        anatomy = survey(pl_module, stream=False)
        named = dict(pl_module.named_parameters())
        for group in anatomy:
            if group.kind in ("heads", "ffn"):
                parts = [p for p in group.parts if "lora_" in p.tensor]
                tensors = {p.tensor: named[anatomy.prefix + p.tensor].tolist() for p in parts}
                owned = [
                    [(p.tensor, p.dim, int(e)) for p in parts for e in p.index[unit]]
                    for unit in range(group.size)
                ]
                self.found[group.name] = torch.tensor(naive.joint_norms(tensors, owned))


@pytest.mark.parametrize("regularizer", ["proximal", "lasso", "none"])
def test_what_adapters_still_hold_is_reported_and_goes(regularizer):
    module, norms = Module("llama"), Norms(6)
    callback = atp(regularizer=regularizer, compact=False)
    assert callback.residual == {}
    fit(module, norms, callback)
    gone = empty_units(module)
    assert sum(map(len, gone.values())) > 0
    assert callback.residual.keys() == gone.keys()
    for name, units in gone.items():
        expected = norms.found[name][units]
        torch.testing.assert_close(callback.residual[name], expected, rtol=1e-3, atol=1e-5)
    left = [float(x.abs().sum()) for x in callback.residual.values()]
    assert sum(left) > 0 or regularizer == "proximal"


def test_both_regularizers_take_from_closed_units():
    held = {}
    for how, top in (("none", None), ("lasso", 0.3), ("proximal", 200.0)):
        module = Module("llama", optimizer="sgd")
        callback = atp(regularizer=how, strength=top, end=9, compact=False)
        fit(module, callback)
        held[how] = sum(float(x.sum()) for x in callback.residual.values())
    assert held["proximal"] < 0.5 * held["none"]
    assert held["lasso"] < 0.9 * held["none"]


@pytest.mark.parametrize("compact", [True, False], ids=str)
@pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
def test_all_weights_may_learn(make, compact):
    module, before = Whole(make=make), Before()
    callback = atp(compact=compact, regularizer="lasso")
    fit(module, callback, before)
    assert callback.residual == {}
    module.eval()
    tokens = held_out()[0][0]
    with torch.no_grad():
        expected, found = before.net(tokens).logits, module.net(tokens).logits
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
    assert (removals_of(module) is not None) == compact
    if not compact:
        gone = sum(int((~m).sum()) for n, m in callback.masks.items() if n.endswith("weight"))
        total = sum(m.numel() for n, m in callback.masks.items() if n.endswith("weight"))
        assert gone / total == pytest.approx(0.5, abs=0.03)


def test_equal_sizes_in_multiples_reload_with_stock_tools(tmp_path):
    module = Module("llama")
    fit(module, atp(sparsity=0.3, multiple_of=8, uniform=True))
    assert module.net.config.intermediate_size in (8, 16)
    assert removals_of(module).reloads == "stock"
    module.eval()
    lightning_prune.save_pretrained(module, tmp_path / "small")
    back = lightning_prune.from_pretrained(tmp_path / "small")
    assert same_bits(said(back), said(module.net))


@pytest.mark.parametrize("budget", ["macs", "bytes"])
def test_other_budgets(budget):
    module = Module("llama")
    callback = atp(budget=budget, compact=False)
    fit(module, callback)
    assert_exact(module, "llama", ["heads", "ffn"], 0.5)  # all weights are used alike


def test_nothing_goes_from_a_group_below_its_least_density():
    module = Module("llama")
    fit(module, atp(sparsity=0.5, units="ffn", min_density=0.5, compact=False))
    assert {len(x) for n, x in empty_units(module).items() if "ffn" in n} == {12}
