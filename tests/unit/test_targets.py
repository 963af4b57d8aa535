from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_prune.targets import Selection, as_globs, canonical_name, select
from tests.refusals import refused
from tests.weights import target


def names(selection: Selection) -> list[str]:
    return [t.name for t in selection.targets]


def reasons(selection: Selection) -> dict[str, str]:
    return {e.name: e.reason for e in selection.excluded}


class Adapter(nn.Module):
    """The names of a LoRA layer of peft."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})


class FancyRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


class Experts(nn.Module):
    def __init__(self, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.ones(2, 3, 4))
        self.scale = nn.Parameter(torch.ones(()))


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.bag = nn.EmbeddingBag(8, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.body = nn.ModuleDict({"dense": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.batch = nn.BatchNorm1d(4)
        self.group = nn.GroupNorm(2, 4)
        self.fancy = FancyRMSNorm()
        self.adapter = Adapter()
        self.experts = Experts()
        self.up = nn.ConvTranspose1d(4, 4, 3)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.classifier = nn.Sequential(nn.Linear(4, 4, bias=False))


def test_the_default_is_weights_of_linear_and_convolutions():
    found = select(Everything())
    assert names(found) == ["conv.weight", "body.dense.weight", "adapter.base_layer.weight"]
    assert [t.layout for t in found.targets] == ["conv", "linear", "linear"]
    assert found.size == 48 + 16 + 16


def test_everything_else_has_its_reason():
    model = Everything()
    found = select(model)
    assert reasons(found) == {
        "embed.weight": "embedding",
        "bag.weight": "embedding",
        "conv.bias": "bias or other vector",
        "body.dense.bias": "bias or other vector",
        "body.norm.weight": "norm",
        "body.norm.bias": "norm",
        "batch.weight": "norm",
        "batch.bias": "norm",
        "group.weight": "norm",
        "group.bias": "norm",
        "fancy.weight": "norm",
        "adapter.lora_A.default.weight": "LoRA adapter",
        "adapter.lora_B.default.weight": "LoRA adapter",
        "experts.up": "parameter of Experts: not a Linear, Conv1D, Conv1d or Conv2d weight",
        "experts.scale": "bias or other vector",
        "up.weight": "parameter of ConvTranspose1d: not a Linear, Conv1D, Conv1d or Conv2d weight",
        "up.bias": "bias or other vector",
        "frozen.weight": "frozen",
        "lm_head.weight": "output head",
        "classifier.0.weight": "output head",
    }
    sizes = found.size + sum(e.size for e in found.excluded)
    assert sizes == sum(p.numel() for p in model.parameters())


def test_a_full_name_overrides_any_exclusion():
    model = Everything()
    for name, layout in [
        ("embed.weight", "table"),
        ("body.norm.weight", "vector"),
        ("body.dense.bias", "vector"),
        ("adapter.lora_A.default.weight", "linear"),
        ("experts.up", "experts"),
        ("experts.scale", "vector"),
        ("up.weight", "table"),
        ("frozen.weight", "linear"),
        ("lm_head.weight", "linear"),
    ]:
        [found] = select(model, targets=[name]).targets
        assert (found.name, found.layout) == (name, layout)
        assert found.parameter is model.get_parameter(name)
    model.experts.is_transposed = True
    assert select(model, targets="experts.up").targets[0].layout == "experts_transposed"


def test_the_output_head_is_found_by_its_getter_too():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4, bias=False)
            self.out = nn.Linear(4, 8, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    assert reasons(select(Model())) == {"out.weight": "output head"}


def test_frozen_weights_can_belong_to_the_default():
    assert "frozen.weight" in names(select(Everything(), frozen=True))


def test_globs_match_parameters_and_the_modules_around_them():
    model = Everything()
    for glob in ("body", "body.*", "b*y", "body.dense", "*.dense.weight", "*dense*", "b[o]dy"):
        assert names(select(model, targets=glob)) == ["body.dense.weight"], glob
    assert names(select(model, targets=["conv", "body"])) == ["conv.weight", "body.dense.weight"]
    assert reasons(select(model, targets="body"))["conv.weight"] == "not matched by targets"
    assert names(select(model, exclude="body")) == ["conv.weight", "adapter.base_layer.weight"]
    assert reasons(select(model, exclude="bod?"))["body.dense.weight"] == "excluded by 'bod?'"
    with refused(where="targets", got="BODY"):  # case counts
        select(model, targets="BODY")


def test_exclude_wins_over_a_full_name():
    model = Everything()
    found = select(model, targets=["conv.weight", "embed.weight"], exclude="embed")
    assert names(found) == ["conv.weight"]


def test_a_glob_does_not_override_exclusions():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "lm_head": nn.Linear(4, 8, bias=False)})
    with refused(where="targets", got="embedding", fix="in full"):
        select(model, targets="embed*")
    with refused(where="targets", got="output head"):
        select(model, targets="lm_head")
    assert names(select(model, targets=["embed*", "lm_head.weight"])) == ["lm_head.weight"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.body = nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, 8, bias=False)
        self.out.weight = self.embed.weight


def test_tied_weights_are_pruned_once_and_only_by_name():
    model = Tied()
    assert names(select(model)) == ["body.weight"]
    assert reasons(select(model)) == {"embed.weight": "tied: embed.weight = out.weight"}
    [found] = select(model, targets="out.weight").targets
    assert (found.name, found.layout, found.aliases) == ("out.weight", "linear", ("embed.weight",))
    both = select(model, targets=["out.weight", "embed.weight"])
    assert len(both.targets) == 1
    assert both.targets[0].parameter is model.embed.weight
    assert both.size == 32
    assert "embed.weight" not in reasons(both)


def test_a_module_that_is_registered_twice_is_not_tied():
    shared = nn.Linear(4, 4, bias=False)
    [found] = select(nn.ModuleDict({"a": shared, "b": shared})).targets
    assert (found.name, found.aliases) == ("a.weight", ("b.weight",))
    with_globs = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2, bias=False)})
    assert names(select(with_globs, targets="b")) == ["a.weight"]
    assert names(select(with_globs, exclude="b")) == ["c.weight"]


def test_transposed_linear_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    [found] = select(nn.Sequential(conv1d)).targets
    assert (found.layout, tuple(found.shape)) == ("transposed", (4, 6))
    assert tuple(found.canonical(found.local).shape) == (1, 6, 1, 4)


def test_another_class_of_that_name_is_not_taken_for_it():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 6))

    with refused(got="parameter of Conv1D"):
        select(nn.Sequential(Conv1D()))


def test_names_are_those_without_torch_compile():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wrapping is enough here: nothing is compiled
        inner = nn.Sequential(torch.compile(model[0]), model[1])
        whole = torch.compile(inner)
    for wrapped in (inner, whole):
        assert names(select(wrapped)) == ["0.weight", "1.weight"]
        assert names(select(wrapped, targets="0.weight", exclude="1")) == ["0.weight"]
    assert canonical_name("a._orig_mod.b._orig_mod.weight") == "a.b.weight"


def test_a_weight_without_usable_values_is_refused():
    with refused(where="0.weight", got="meta device", fix="exclude=['0.weight']"):
        select(nn.Sequential(nn.Linear(4, 4, bias=False, device="meta")))
    whole = nn.Linear(4, 4, bias=False)
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert (
        reasons(select(nn.Sequential(whole, nn.Linear(2, 2, bias=False))))["0.weight"] == "frozen"
    )
    with refused(where="0.weight", got="int8", allowed="bfloat16"):
        select(nn.Sequential(whole), targets="0.weight")
    model = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.complex64))
    with refused(where="0.weight", got="complex64"):
        select(model)


@pytest.mark.parametrize("argument", ["targets", "exclude"])
def test_a_glob_that_matches_nothing_is_refused(argument):
    with refused(where=argument, got="encoder.*", allowed="'embed.weight'", fix="plan"):
        select(Everything(), **{argument: ["conv", "encoder.*"]})


@pytest.mark.parametrize("argument", ["targets", "exclude"])
def test_globs_are_a_list_of_words(argument):
    with refused(where=argument, fix="leave"):
        select(Everything(), **{argument: []})
    for wrong in ([""], [None], [3]):
        with refused(where=argument, got=str(wrong[0]), allowed="non-empty strings"):
            select(Everything(), **{argument: wrong})
    with refused(where=argument, got="3", allowed="non-empty strings"):
        select(Everything(), **{argument: as_globs(3)})


def test_a_selection_of_nothing_is_refused():
    with refused(where="ReLU", got="no parameters"):
        select(nn.ReLU())
    with refused(where="Sequential", got="frozen", fix="in full"):
        select(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))
    with refused(got="excluded by '*'"):
        select(nn.Sequential(nn.Linear(2, 2)), exclude="*")


LAYOUTS = {
    "linear": ((3, 5), (1, 3, 1, 5), lambda i: (0, i[0], 0, i[1])),
    "transposed": ((5, 3), (1, 3, 1, 5), lambda i: (0, i[1], 0, i[0])),
    "conv": ((3, 5, 2, 4), (1, 3, 8, 5), lambda i: (0, i[0], 4 * i[2] + i[3], i[1])),
    "experts": ((2, 3, 5), (2, 3, 1, 5), lambda i: (i[0], i[1], 0, i[2])),
    "experts_transposed": ((2, 5, 3), (2, 3, 1, 5), lambda i: (i[0], i[2], 0, i[1])),
    "vector": ((3,), (1, 3, 1, 1), lambda i: (0, i[0], 0, 0)),
    "table": ((3, 2, 5), (1, 3, 1, 10), lambda i: (0, i[0], 0, 5 * i[1] + i[2])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_canonical_views_share_storage_and_have_inputs_last(layout):
    shape, expected, place = LAYOUTS[layout]
    t = target(torch.zeros(shape), layout=layout)
    view = t.canonical(t.local)
    assert tuple(view.shape) == expected
    for index in torch.ones(shape).nonzero().tolist():
        t.local[tuple(index)] = 1.0
        assert view.nonzero().tolist() == [list(place(index))]
        view[place(index)] = 0.0
        assert not t.local.any()


def test_local_shares_storage_outside_autograd():
    t = target(torch.ones(2, 2))
    assert not t.local.requires_grad
    assert t.local.data_ptr() == t.parameter.data_ptr()
    assert (t.size, tuple(t.shape), t.sharded) == (4, (2, 2), False)
