"""Units pruned while training: budgets, laws, and cutting them out of the model."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_prune
from lightning_prune.anatomy import survey
from lightning_prune.removal import removals_of
from lightning_prune.unit_layout import Layout
from tests.conformance.law_4_resume import SaveAlways
from tests.conformance.toy import batches, train
from tests.conformance.watch import copied, same_bits, weights
from tests.refusals import refused
from tests.structured import Module, bert, llama, pruner

ALL = ["heads", "ffn", "hidden", "layers"]


def whole_units(module: Module) -> tuple[int, int]:
    """How many heads and neurons are zero in every one of their slices, and how many are there."""
    anatomy = survey(module)
    parameters = dict(module.net.named_parameters())
    empty = every = 0
    for group in anatomy:
        if group.kind not in ("heads", "ffn"):
            continue
        for unit in range(group.size):
            slices = [
                parameters[p.tensor].detach().index_select(p.dim, p.index[unit])
                for p in group.parts
            ]
            empty += not any(bool(s.any()) for s in slices)
            every += 1
    return empty, every


@pytest.mark.parametrize("make", [bert, llama])
def test_only_whole_units_go_and_the_budget_is_met(make):
    module, callback = Module(make=make), pruner()
    train(module, callback)
    pruner_targets = callback.selection(module).targets
    zeros = sum(int((t.local == 0).sum()) for t in pruner_targets)
    total = sum(t.size for t in pruner_targets)
    assert 0.5 * total <= zeros < 0.5 * total + 2 * 16 + 1
    assert module.trainer.callback_metrics["sparsity/actual"] == pytest.approx(zeros / total)
    empty, every = whole_units(module)
    assert 0 < empty < every
    anatomy = survey(module)
    kept = Layout(anatomy=anatomy, kinds=("heads", "ffn")).kept(callback.masks)
    assert sum(int((~k).sum()) for k in kept.values()) == empty


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("units", [["heads", "ffn"], ALL])
def test_the_model_that_is_cut_gives_what_the_masked_one_gave(make, units, monkeypatch):
    module = Module(make=make)
    callback = pruner(units=units, compact=True, sparsity=0.4)
    seen = {}
    real = type(callback)._cut

    def cut(self, trainer, pl_module):
        seen["before"] = copy.deepcopy(pl_module.net)
        seen["kept"] = {n: m.clone() for n, m in self._kept.items()}
        seen["anatomy"] = self._layout.anatomy
        real(self, trainer, pl_module)

    monkeypatch.setattr(type(callback), "_cut", cut)
    train(module, callback)
    kept = {n: m for n, m in seen["kept"].items() if not m.all()}
    assert kept
    found = lightning_prune.removal.difference(seen["before"], module.net, seen["anatomy"], kept)
    assert found <= 1e-5
    assert sum(p.numel() for p in module.parameters()) < sum(
        p.numel() for p in seen["before"].parameters()
    )
    assert callback.masks == {}
    for name, parameter in module.net.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "classifier" not in name:
            assert parameter.any(1).all(), name


def test_uniform_widths_and_multiples_reload_stock(tmp_path):
    module = Module(make=llama)
    train(module, pruner(compact=True, uniform=True, multiple_of=4))
    config = module.net.config
    assert config.intermediate_size % 4 == 0
    assert config.intermediate_size < 24 or config.num_attention_heads < 4
    assert removals_of(module).reloads == "stock"
    lightning_prune.save_pretrained(module, tmp_path / "small", stock=True)
    back = type(module.net).from_pretrained(tmp_path / "small")
    ids = batches(1)[0][0]
    module.eval()
    torch.testing.assert_close(back(ids).logits, module.net(ids).logits)


def test_a_shape_that_no_config_can_say_comes_back_by_manifest(tmp_path):
    module = Module()
    train(module, pruner(compact=True))
    assert removals_of(module).reloads == "manifest"
    with refused(what="stock config", fix="uniform"):
        lightning_prune.save_pretrained(module, tmp_path / "small", stock=True)
    lightning_prune.save_pretrained(module, tmp_path / "small")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        type(module.net).from_pretrained(tmp_path / "small")
    back = lightning_prune.from_pretrained(tmp_path / "small")
    ids = batches(1)[0][0]
    module.eval()
    assert same_bits(back(ids).logits, module.net(ids).logits)


# Laws -------------------------------------------------------------------------------------------


def test_training_goes_on_after_a_removal_as_it_would_have_with_masks():
    small, masked = Module(), Module()
    train(small, pruner(compact="early", end=6))
    train(masked, pruner(compact=True, end=6))
    assert small.trainer.global_step == masked.trainer.global_step == 10
    for (name, a), (other, b) in zip(
        small.net.named_parameters(), masked.net.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Watch(L.Callback):
    """Notes names, and weights that must be zero and are not."""

    def __init__(self, pruner) -> None:
        self.pruner, self.names, self.leaks = pruner, set(), []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.names.add(tuple(pl_module.state_dict()))
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.pruner.masks.items():
            if parameters[name].detach()[~mask].any():
                self.leaks.append((trainer.global_step, name))


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "fused"])
def test_names_stay_and_zeros_stay_zero(optimizer):
    module = Module(optimizer=optimizer)
    before = tuple(module.state_dict())
    callback = pruner()
    watch = Watch(callback)
    train(module, callback, watch)
    assert watch.names == {before}
    assert not watch.leaks
    assert tuple(module.state_dict()) == before


def test_under_averages_zeros_stay_zero():
    module, callback = Module(), pruner()
    train(module, EMAWeightAveraging(decay=0.5), callback)
    assert whole_units(module)[0] > 0
    parameters = dict(module.named_parameters())
    for name, mask in callback.masks.items():
        assert not parameters[name].detach()[~mask].any(), name


@pytest.mark.parametrize("units", [["heads", "ffn"], ALL])
@pytest.mark.parametrize("compact", [True, "early"])
def test_off_is_off(units, compact):
    dense, off = Module(), Module()
    train(dense)
    train(off, pruner(units=units, sparsity=0.0, compact=compact))
    assert same_bits(copied(weights(off)), copied(weights(dense)))


def test_nothing_of_ours_stays_on_the_model():
    module = Module()
    train(module, pruner(units=ALL, compact=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_bf16_mixed_runs():
    module, callback = Module(), pruner(units=ALL, compact="early", end=6)
    train(module, callback, precision="bf16-mixed")
    assert removals_of(module) is not None


# Choice -----------------------------------------------------------------------------------------


def test_units_with_the_least_weights_go_first():
    module = Module(optimizer="still")
    with torch.no_grad():
        module.net.bert.encoder.layer[1].intermediate.dense.weight[[3, 7]] *= 1e-3
        module.net.bert.encoder.layer[1].output.dense.weight[:, [3, 7]] *= 1e-3
    train(module, pruner(units="ffn", sparsity=2 / 72))
    dead = (module.net.bert.encoder.layer[1].output.dense.weight == 0).all(0)
    assert dead.nonzero().flatten().tolist() == [3, 7]


def test_neurons_that_do_nothing_go_first_by_activation():
    module = Module(optimizer="still")
    with torch.no_grad():
        layer = module.net.bert.encoder.layer[2].intermediate.dense
        layer.weight[[1, 5]] *= 1e-3
        layer.bias[[1, 5]] = -9.0  # gelu gives nothing there, however large the weights that follow
        module.net.bert.encoder.layer[2].output.dense.weight[:, [1, 5]] *= 9
    train(module, pruner(units="ffn", sparsity=2 / 72, criterion="activation"))
    dead = (module.net.bert.encoder.layer[2].output.dense.weight == 0).all(0)
    assert dead.nonzero().flatten().tolist() == [1, 5]


def test_activations_of_training_alone_count():
    masks = []
    for validate in (False, True):
        callback = pruner(criterion="activation")
        train(Module(), callback, validate=validate, val_check_interval=2)
        masks.append(callback.masks)
    assert same_bits(*masks)


def test_activations_with_gradient_checkpointing():
    masks = []
    for checkpointing in (False, True):
        module, callback = Module(make=llama), pruner(criterion="activation")
        if checkpointing:
            plain = module.net.gradient_checkpointing_enable  # renamed in transformers 5.23
            getattr(module.net, "activation_checkpointing_enable", plain)()
        train(module, callback)
        masks.append(callback.masks)
    assert same_bits(*masks)


def test_where_sub_layers_may_go_the_first_attention_stays():
    for seed in range(4):
        module = Module(seed=seed)
        units = ["attention", "layers"]
        train(module, pruner(units=units, sparsity=0.6, compact=True, exclude="*pooler*"))
        assert module.net.bert.encoder.layer[0].attention.self.query.weight.any()


class Headed(Module):
    """Has a part of its own behind the transformers network."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.head = torch.nn.Linear(4, 4)


def test_channels_are_refused_where_a_part_outside_may_read_them():
    with refused(what="outside", got="head.weight"):
        train(Headed(), pruner(units="hidden", compact=True))
    train(Headed(), pruner(units="ffn", compact=True))


def test_two_callbacks_with_units_in_one_trainer():
    module = Module()
    heads = pruner(units="heads", targets="*attention*")
    neurons = pruner(units="ffn", targets=["*intermediate*", "*layer.?.output.*"])
    train(module, heads, neurons)
    assert heads._actual >= 0.5
    assert neurons._actual >= 0.5


def test_a_checkpoint_of_a_deeper_model_changes_nothing(tmp_path):
    saver = SaveAlways(tmp_path)
    train(Module(), pruner(units="ffn", compact="early", end=6), saver)
    deeper = Module(make=lambda: bert(num_hidden_layers=4))
    size = sum(p.numel() for p in deeper.parameters())
    with refused(what="another size"):
        train(deeper, pruner(units="ffn", compact="early", end=6), ckpt_path=tmp_path / "8.ckpt")
    assert sum(p.numel() for p in deeper.parameters()) == size


def test_activation_refuses_weights_and_a_first_cut_without_batches():
    with refused(what="whole units", fix="units"):
        pruner(units=None, criterion="activation")
    with refused(what="before any batch", fix="later start"):
        train(Module(), pruner(criterion="activation", schedule="oneshot", start=0, end=1.0))
    with refused(what="no score", where="head_dims"):
        train(Module(), pruner(criterion="activation", units="head_dims"))


def test_a_budget_in_bytes_and_in_macs():
    for budget in ("bytes", "macs"):
        module, callback = Module(), pruner(budget=budget, sparsity=0.4)
        train(module, callback)
        assert 0.4 <= callback._actual < 0.45


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"units": ["channels"]}, {"got": "channels", "allowed": "'layers'"}),
        ({"units": ["neurons"]}, {"got": "neurons", "allowed": "'ffn'"}),
        ({"units": ["hidden"]}, {"fix": "compact=True"}),
        ({"units": None, "uniform": True}, {"got": "no units"}),
        ({"compact": "soon"}, {"got": "soon"}),
        ({"pattern": "row"}, {"fix": "leave pattern"}),
        ({"initial_sparsity": 0.1}, {"fix": "compact(model)"}),
    ],
)
def test_arguments_that_are_refused(wanted, said):
    with refused(**said):
        pruner(**wanted)


def test_budgets_and_units_that_are_refused():
    with refused(what="cannot be met", allowed="at most"):
        train(Module(), pruner(sparsity=0.99))
    with refused(what="no units of this kind", got="one query"):
        train(Module(), pruner(units="query_heads"))
    with refused(what="middle of this run", got="averages"):
        train(Module(), EMAWeightAveraging(), pruner(compact="early"))
    with refused(what="middle of this run", got="no units"):
        train(Module(), pruner(units=None, compact="early"))
    with refused(what="Sizes stay multiples", got="0"):
        pruner(multiple_of=0)
    with refused(what="One callback cuts", fix="last one"):
        train(
            Module(),
            pruner(targets="*attention*", units="heads", compact=True),
            pruner(targets=["*intermediate*", "*.output.*"], units="ffn", compact=True),
        )
    with refused(what="middle of this run", got="another pruning callback"):
        train(
            Module(),
            pruner(compact="early", exclude="*pooler*"),
            pruner(targets="*pooler*", units=None),
        )
    with refused(what="No selected weight", fix="targets"):
        train(Module(), pruner(targets=["*attention*"]))
    half = Module()
    for name, parameter in half.named_parameters():
        parameter.requires_grad_("layer.1." not in name)
    with refused(what="No selected weight", where="layer.1", fix="targets"):
        train(half, pruner(units="layers", sparsity=0.3, compact=True))


def test_a_callback_that_has_cut_a_model_refuses_another():
    callback = pruner(compact=True)
    train(Module(), callback)
    with refused(what="cut another model", fix="new callback"):
        train(Module(), callback)


def test_a_second_fit_goes_on_with_the_small_model(tmp_path: Path):
    module, callback = Module(), pruner(compact=True)
    train(module, callback)
    size = sum(p.numel() for p in module.parameters())
    train(module, callback)
    assert sum(p.numel() for p in module.parameters()) == size
