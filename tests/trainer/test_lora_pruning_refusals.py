"""What pruning under LoRA refuses, and when."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_prune import plan
from lightning_prune.callbacks import LoRAPruning
from tests import lora_networks as nets
from tests.adapted import Module, adapted, pruner
from tests.conformance.toy import train
from tests.conformance.watch import copied, same_bits
from tests.refusals import refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"units": []}, {"where": "units", "got": "[]", "fix": "units=['heads', 'ffn']"}),
        ({"units": ["neurons"]}, {"where": "units", "got": "neurons", "allowed": "'ffn'"}),
        ({"units": "hidden"}, {"where": "units", "got": "hidden", "allowed": "'query_heads'"}),
        ({"units": ["ffn", "layers"]}, {"where": "units", "got": "layers"}),
        ({"allocation": "erk"}, {"where": "allocation", "got": "erk", "allowed": "'global'"}),
        ({"allocation": {"*": 0.5}}, {"where": "allocation", "got": "0.5"}),
        ({"pattern": "2:4"}, {"where": "pattern", "fix": "leave pattern"}),
        ({"initial_sparsity": 0.1}, {"where": "initial_sparsity", "fix": "compact(model)"}),
        ({"compact": "early"}, {"where": "compact", "got": "early", "fix": "leave it out"}),
        ({"compact": True, "merge": False}, {"where": "merge=False", "allowed": "merge=True"}),
        ({"units": None, "multiple_of": 8}, {"where": "multiple_of", "got": "no units"}),
        ({"units": None, "uniform": True}, {"where": "uniform", "got": "no units"}),
        ({"units": None, "allocation": "most"}, {"where": "allocation", "got": "most"}),
        ({"units": None, "pattern": "2:4", "sparsity": 0.6}, {"fix": "sparsity=0.5"}),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, expected):
    with refused(**expected):
        LoRAPruning(**({"sparsity": 0.5} | arguments))


@pytest.mark.parametrize("argument", ["spare_first", "spare_last"])
@pytest.mark.parametrize("value", [-1, 1.0, 1.5, -0.1, True, "1", None, float("nan")], ids=str)
def test_layers_are_spared_by_number_or_share(argument, value):
    with refused(where=f"LoRAPruning({argument}=...)", got=str(value), allowed="[0, 1)"):
        LoRAPruning(0.5, **{argument: value})


@pytest.mark.parametrize("value", [1.0, 1, -0.1, float("nan"), True, "0.9", None], ids=str)
@pytest.mark.parametrize("units", ["ffn", None])
def test_a_moving_average_keeps_a_share_of_the_past(units, value):
    with refused(where="beta", got=str(value), allowed="[0, 1)"):
        LoRAPruning(0.5, units=units, beta=value)


def refuses(module: Module, callback: LoRAPruning | None = None, **expected: str) -> None:
    """A fit is refused before any batch, and leaves the network as it was."""
    before, seen = copied(module.state_dict()), []
    module.on_train_batch_start = lambda *_: seen.append(1)  # type: ignore[method-assign]
    with refused(**expected):
        train(module, callback or pruner())
    assert not seen
    assert same_bits(dict(module.state_dict()), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


BOTH = pytest.mark.parametrize("units", [["heads", "ffn"], None], ids=str)


@BOTH
def test_a_network_without_adapters_is_refused(units):
    module = Module(net=nets.network("llama"))
    refuses(module, pruner(units=units), what="no LoRA adapter", fix="get_peft_model")


@BOTH
def test_another_variant_of_lora_is_refused(units):
    module = Module("llama", use_dora=True)
    refuses(module, pruner(units=units), what="variant of LoRA", got="Dora", fix="use_dora")


@BOTH
def test_adapters_on_no_layer_that_would_be_pruned_are_refused(units):
    module = Module("llama", target_modules=["lm_head"])
    refuses(
        module, pruner(units=units, merge=False), what="No adapter that learns", fix="all-linear"
    )
    module = Module("llama", target_modules=["q_proj"])
    wanted = {"units": "ffn"} if units else {"units": None, "targets": "*mlp*"}
    refuses(module, pruner(**wanted), what="No adapter that learns", got="q_proj", allowed="proj")


@BOTH
def test_frozen_adapters_are_refused(units):
    module = Module("llama")
    module.other = torch.nn.Parameter(torch.ones(1))  # so that there is an optimizer
    module.net.requires_grad_(False)
    refuses(
        module,
        pruner(units=units),
        what="No adapter that learns",
        got="on no layer",
        fix="is_trainable=True",
    )


@BOTH
def test_a_merged_adapter_is_refused(units):
    module = Module("llama")
    module.net.merge_adapter()
    refuses(module, pruner(units=units), what="merged into", fix="unmerge_adapter")


@pytest.mark.parametrize("merge", [True, False])
def test_quantised_base_weights_are_refused(merge):
    module = Module("llama")
    for layer in module.net.base_model.model.model.layers:
        base = layer.mlp.up_proj.base_layer
        base.weight = torch.nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    refuses(module, pruner(merge=merge), what="plain floating-point", got="torch.int8")


def test_what_a_merge_would_drop_is_refused_before_training():
    net = adapted("llama")
    net.add_adapter("other", nets.config("llama", init_lora_weights=False))
    net.set_adapter("default")
    refuses(Module(net=net), what="inactive adapter", got="'other'", fix="delete_adapter")
    train(Module(net=net), pruner(merge=False))


def test_layers_that_are_all_spared_are_refused():
    for wanted in ({"spare_first": 2}, {"spare_first": 1, "spare_last": 1}, {"spare_last": 9}):
        refuses(Module("llama"), pruner(**wanted), what="spared", where="spare_first", fix="spare")


def test_units_that_the_network_has_not_are_refused():
    refuses(Module("bert"), pruner(units="query_heads"), what="no units of this kind")


def test_a_sparsity_that_cannot_be_met_is_refused():
    refuses(Module("llama"), pruner(sparsity=0.97), what="cannot be met", allowed="at most")
    refuses(Module("llama"), pruner(units=None, sparsity=0.999), what="cannot be met")
    refuses(
        Module("llama"), pruner(sparsity=0.6, min_density=0.5), what="cannot be met", fix="lower"
    )


@BOTH
def test_a_network_in_which_as_much_is_zero_already_is_refused(units):
    module = Module("llama")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("base_layer.weight"):
                parameter[:, ::2] = 0.0
    refuses(
        module,
        pruner(units=units, sparsity=0.4),
        what="met already",
        got="0.5000 of the selected weights",
        fix="SparseRetraining",
    )


def test_a_first_cut_before_any_gradient_is_refused():
    refuses(
        Module("llama"),
        pruner(schedule="oneshot", start=0),
        what="before any gradient",
        fix="later start",
    )


def test_plans_refuse_what_runs_refuse():
    with refused(what="no LoRA adapter"):
        plan(nets.network("llama"), pruner(), total_steps=10)
    with refused(what="cannot be met"):
        plan(adapted("llama"), pruner(sparsity=0.97), total_steps=10)
    with refused(what="spared"):
        plan(adapted("llama"), pruner(spare_first=2), total_steps=10)


# While it trains --------------------------------------------------------------------------------


@BOTH
def test_steps_that_go_past_lightning_are_refused(units):
    class Own(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with refused(what="does not know of", where="LoRAPruning", fix="self.optimizers()"):
        train(Own(), pruner(units=units))


@BOTH
def test_gradients_that_are_not_finite_are_told_of_at_the_next_update(units):
    class Broken(Module):
        def loss(self, batch: Any) -> torch.Tensor:
            bad = self.trainer.global_step == 4
            return super().loss(batch) * (float("nan") if bad else 1.0)

    module, callback = Broken(optimizer="still"), pruner(units=units)
    with refused(what="not finite"):
        train(module, callback)
    assert module.trainer.global_step == 6


def test_an_adapter_that_never_learns_is_told_of():
    class Half(Module):
        """The second layer's adapters are in no optimizer."""

        def configure_optimizers(self) -> Any:
            named = self.named_parameters()
            return torch.optim.SGD(
                [p for n, p in named if p.requires_grad and "layers.0" in n], lr=0.1
            )

    with refused(what="before any gradient", where="layers.1", fix="look whether the adapters"):
        train(Half(), pruner())


def test_a_second_fit_with_a_model_that_is_whole_is_refused():
    callback = pruner()
    train(Module(), callback)
    with refused(what="cut another model", fix="new callback"):
        train(Module(), callback)


@BOTH
def test_a_second_fit_of_the_model_that_was_merged_is_refused(units):
    module, callback = Module(), pruner(units=units, compact=False)
    train(module, callback)
    module.requires_grad_(True)
    with refused(what="merged by an earlier fit", fix="new callback"):
        train(module, callback)


@pytest.mark.parametrize(
    ("changed", "got"),
    [
        ({"beta": 0.5}, "0.9 in the checkpoint, 0.5 now"),
        ({"spare_last": 1}, "0 in the checkpoint, 1 now"),
        ({"allocation": "global"}, "uniform in the checkpoint, global now"),
        ({"multiple_of": 2}, "1 in the checkpoint, 2 now"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(changed, got, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:  # before anything is pruned
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    train(Module(), pruner(merge=False), Save())
    field = next(iter(changed))
    # masks of spared layers are missing, which may be told of first
    expected = {"what": "checkpoint"} if field == "spare_last" else {"got": got, "where": field}
    with refused(**expected):
        train(Module(), pruner(merge=False, **changed), ckpt_path=tmp_path / "a.ckpt")
