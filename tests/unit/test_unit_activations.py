"""Importance of units from activations, against loops over examples that were never padded."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.anatomy import ActivationImportance, calibrate, survey
from lightning_prune.anatomy.activity import channel_squares, turns
from lightning_prune.distributed import Shards
from tests import families
from tests import oracle_units as oracle
from tests.refusals import refused
from tests.unit_networks import PLACES, heads_of, made, padded, seen, sequences

LENGTHS = (5, 2, 7, 1)


def expected(
    network: Any, family: str, examples: list[dict[str, Tensor]]
) -> dict[str, list[float]]:
    places, config = PLACES[family], network.config
    layers = [f"{places.layers}.{i}" for i in range(config.num_hidden_layers)]
    relative = {places.out, places.down, *places.norms, *places.before}
    relative |= {p for p, _ in places.after}
    paths = {*layers, *(f"{layer}.{path}" for layer in layers for path in relative)}
    runs = seen(network, paths, examples)
    result: dict[str, list[float]] = {"hidden": [0.0] * config.hidden_size, "layers": []}
    for i, layer in enumerate(layers):
        out, down = runs[f"{layer}.{places.out}", "in"], runs[f"{layer}.{places.down}", "in"]
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        units, across = heads_of(heads, groups, out[0].shape[1] // heads)
        result[f"layers.{i}.heads"] = [oracle.activity(out, unit) for unit in units]
        if across:
            result[f"layers.{i}.query_heads"] = [oracle.activity(out, unit) for unit in across]
        neurons = range(down[0].shape[1])
        result[f"layers.{i}.ffn"] = [oracle.activity(down, [n]) for n in neurons]
        for norm in places.norms:
            given = runs[f"{layer}.{norm}", "out"]
            for c in range(config.hidden_size):
                result["hidden"][c] += oracle.activity(given, [c])
        result["layers"].append(oracle.turned(runs[layer, "in"], runs[layer, "out"]))
        for kind, start, (end, side) in zip(
            ("attention", "mlp"), places.before, places.after, strict=True
        ):
            x, y = runs[f"{layer}.{start}", "in"], runs[f"{layer}.{end}", side]
            after = y if side == "in" else [a + b for a, b in zip(x, y, strict=True)]
            result.setdefault(kind, []).append(oracle.turned(x, after))
    return result


def close(found: dict[str, Tensor], wanted: dict[str, list[float]], rtol: float = 1e-4) -> None:
    assert set(found) == set(wanted)
    for name, score in found.items():
        assert score.dtype == torch.float64
        assert score.device.type == "cpu"
        np.testing.assert_allclose(
            score.numpy(), wanted[name], rtol=rtol, atol=1e-6, err_msg=name, strict=False
        )


def batch_of(
    family: str, spare: int = 0, channels: int = 1
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """One batch, and its examples without padding."""
    if family == "vit":
        whole = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(3))
        return {"pixel_values": whole}, [{"pixel_values": image[None]} for image in whole]
    rows = sequences(LENGTHS)
    ids, mask = padded(rows, spare)
    return {"input_ids": ids, "attention_mask": mask}, [{"input_ids": row[None]} for row in rows]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", PLACES)
def test_scores_are_those_of_the_formula(family: str, seed: int) -> None:
    network = made(family, seed)
    batch, examples = batch_of(family, channels=getattr(network.config, "num_channels", 1))
    importance = calibrate(network, [batch], survey(network))
    close(importance.scores(), expected(network, family, examples))
    assert importance.examples == len(examples)
    assert set(importance.missing) <= {g.name for g in survey(network) if g.kind == "head_dims"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_labels", [False, True])
def test_t5_counts_tokens_of_encoder_and_decoder(seed: int, with_labels: bool) -> None:
    network = made("t5", seed, "T5ForConditionalGeneration" if with_labels else "")
    config = network.config
    sources, targets = sequences(LENGTHS, 1), sequences((2, 4, 3, 6), 2)
    ids, mask = padded(sources)
    below, below_mask = padded(targets)
    batch = {"input_ids": ids, "attention_mask": mask}
    pairs = zip(sources, targets, strict=True)
    if with_labels:
        batch["labels"] = below.masked_fill(below_mask == 0, -100)
        examples = [{"input_ids": s[None], "labels": t[None]} for s, t in pairs]
    else:
        batch |= {"decoder_input_ids": below, "decoder_attention_mask": below_mask}
        examples = [{"input_ids": s[None], "decoder_input_ids": t[None]} for s, t in pairs]

    heads, _ = heads_of(config.num_heads, config.num_heads, config.d_kv)
    stacks = (("encoder", config.num_layers, "1"), ("decoder", config.num_decoder_layers, "2"))
    inner = {
        "encoder": ("layer.0.SelfAttention.o", "layer.0.layer_norm", "layer.1.layer_norm"),
        "decoder": (
            "layer.0.SelfAttention.o",
            "layer.1.EncDecAttention.o",
            *(f"layer.{i}.layer_norm" for i in range(3)),
        ),
    }
    paths = {
        f"{stack}.block.{i}{rest}"
        for stack, count, last in stacks
        for i in range(count)
        for rest in (
            "",
            *(f".{p}" for p in inner[stack]),
            f".layer.{last}.DenseReluDense",
            f".layer.{last}.DenseReluDense.wo",
        )
    }
    runs = seen(network, paths, examples)
    wanted: dict[str, list[float]] = {"hidden": [0.0] * config.d_model}
    for stack, count, last in stacks:
        for i in range(count):
            block = f"{stack}.block.{i}"
            for path in inner[stack]:
                if path.endswith("layer_norm"):
                    given = runs[f"{block}.{path}", "out"]
                    for c in range(config.d_model):
                        wanted["hidden"][c] += oracle.activity(given, [c])
                    continue
                name = f"{stack}.{'cross_' * ('EncDec' in path)}heads"
                score = [oracle.activity(runs[f"{block}.{path}", "in"], unit) for unit in heads]
                before = wanted.get(name, [0.0] * config.num_heads)
                wanted[name] = [a + b for a, b in zip(before, score, strict=True)]
            ffn = f"{block}.layer.{last}.DenseReluDense"
            wanted[f"{stack}.layers.{i}.ffn"] = [
                oracle.activity(runs[f"{ffn}.wo", "in"], [n]) for n in range(config.d_ff)
            ]
            x = runs[f"{block}.layer.{last}.layer_norm", "in"]
            y = [a + b for a, b in zip(x, runs[ffn, "out"], strict=True)]
            wanted.setdefault(f"{stack}.mlp", []).append(oracle.turned(x, y))
            turn = oracle.turned(runs[block, "in"], runs[block, "out"])
            wanted.setdefault(f"{stack}.layers", []).append(turn)
    close(calibrate(network, [batch], survey(network)).scores(), wanted)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_with_every_head_gives_a_score_to_every_unit(family: str, seed: int) -> None:
    network = families.network(family, seed)
    anatomy = survey(network)
    importance = calibrate(network, [families.batch(network)], anatomy)
    scores = importance.scores()
    assert set(scores) | set(importance.missing) == set(anatomy.groups)
    assert {anatomy.groups[name].kind for name in importance.missing} <= {"head_dims"}
    for name, score in scores.items():
        assert len(score) == anatomy.groups[name].size
        if anatomy.groups[name].kind != "ffn":  # some are cut off by a ReLU
            assert float(score.min()) > 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3"])
def test_padding_does_not_matter(family: str) -> None:
    network = made(family).double()
    anatomy = survey(network)
    batch, examples = batch_of(family)
    more, _ = batch_of(family, spare=4)
    alone = calibrate(network, examples, anatomy).scores()
    for name, score in calibrate(network, [batch], anatomy).scores().items():
        torch.testing.assert_close(score, alone[name], rtol=1e-5, atol=1e-7)
    for name, score in calibrate(network, [more], anatomy).scores().items():
        torch.testing.assert_close(score, alone[name], rtol=1e-5, atol=1e-7)
    # and without a mask, padding would count
    unmasked = calibrate(network, [{"input_ids": more["input_ids"]}], anatomy).scores()
    assert not torch.allclose(unmasked["layers.0.ffn"], alone["layers.0.ffn"], rtol=1e-2)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_splitting_into_batches_and_processes_does_not_matter(family: str) -> None:
    network = made(family)
    anatomy = survey(network)
    batch, _ = batch_of(family)
    parts = [{n: t[:1] for n, t in batch.items()}, {n: t[1:] for n, t in batch.items()}]
    whole = calibrate(network, [batch], anatomy)
    split = calibrate(network, parts, anatomy)
    assert split.examples == whole.examples
    one, two = (calibrate(network, [part], anatomy) for part in parts)

    class Both(Shards):
        """Two processes, of which the other one has seen the other batch."""

        def stack(self, counts: Tensor) -> Tensor:
            state = two.state_dict()
            other = [*state["sums"].values(), *state["counts"].values()]
            return torch.stack([counts, torch.cat([t.flatten() for t in other])])

    reduced = one.scores(Both())
    assert set(reduced) == set(whole.scores())
    one.merge(two.state_dict())
    assert one.examples == whole.examples
    for name, score in whole.scores().items():
        for other in (split.scores(), reduced, one.scores()):
            torch.testing.assert_close(other[name], score, rtol=1e-4, atol=1e-6)


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_nothing_is_left_behind() -> None:
    network = made("bert")
    network.train()
    network.encoder.eval()
    modes = [m.training for m in network.modules()]
    before, keys = hooks(network), list(network.state_dict())
    random = torch.get_rng_state()
    anatomy = survey(network)
    batch, _ = batch_of("bert")
    importance = ActivationImportance(network, anatomy)
    assert hooks(network) > before
    importance.close()
    assert hooks(network) == before
    calibrate(network, [batch], anatomy)
    with pytest.raises(IndexError), ActivationImportance(network, anatomy):
        network(input_ids=torch.full((2, 3), 99))
    assert hooks(network) == before
    assert list(network.state_dict()) == keys
    assert [m.training for m in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_planted_dead_units_come_last(family: str) -> None:
    network = made(family)
    parameters = dict(network.named_parameters())
    anatomy = survey(network)
    dead = [1, 4]
    with torch.no_grad():
        # what leads into the neurons gives nothing, what leads out of them stays
        for part in (p for way in anatomy.groups["layers.1.ffn"].silent_if[1:] for p in way):
            rows = part.index[dead].flatten()
            parameters[part.tensor].index_fill_(part.dim, rows, 0.0)
        for part in anatomy.groups["layers.0.heads"].silent_if[1]:
            parameters[part.tensor].index_fill_(part.dim, part.index[1], 0.0)
    batch, _ = batch_of(family)
    scores = calibrate(network, [batch], anatomy).scores()
    assert sorted(scores["layers.1.ffn"].argsort()[:2].tolist()) == dead
    assert scores["layers.1.ffn"][dead].tolist() == [0.0, 0.0]
    assert scores["layers.1.ffn"].gt(0).sum() == len(scores["layers.1.ffn"]) - 2
    assert scores["layers.0.heads"][1] == 0
    assert scores["layers.0.heads"][0] > 0


def test_a_layer_that_does_nothing_scores_nothing() -> None:
    network = made("llama")
    layer = network.layers[1]
    with torch.no_grad():
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            for parameter in module.parameters():
                parameter.zero_()
    batch, _ = batch_of("llama")
    scores = calibrate(network, [batch], survey(network)).scores()
    for kind in ("layers", "attention", "mlp"):
        assert abs(float(scores[kind][1])) < 1e-12
        assert float(scores[kind][0]) > 1e-3


def test_a_module_around_the_network_and_labels() -> None:
    class Around(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.inner = network

    network = made("bert", head="BertForSequenceClassification")
    batch, _ = batch_of("bert")
    batch["labels"] = torch.tensor([0, 1, 0, 1])
    around = Around(network)
    scores = calibrate(around, [batch], survey(around)).scores()
    bare = calibrate(network, [batch], survey(network)).scores()
    assert all(torch.equal(score, bare[name]) for name, score in scores.items())


def test_the_limit_counts_examples_and_fetches_no_more_batches() -> None:
    network = made("bert")
    anatomy = survey(network)
    batch, examples = batch_of("bert")
    fetched = []

    def loader():
        for i in range(5):
            fetched.append(i)
            yield batch

    limited = calibrate(network, loader(), anatomy, limit=6)
    assert limited.examples == 6
    assert fetched == [0, 1]
    same = calibrate(network, [*examples, *examples[:2]], anatomy)
    for name, score in limited.scores().items():
        torch.testing.assert_close(score, same.scores()[name], rtol=1e-4, atol=1e-6)


def test_state_goes_through_a_safe_checkpoint(tmp_path: Any) -> None:
    network = made("gpt2")
    anatomy = survey(network)
    _, examples = batch_of("gpt2")
    first = calibrate(network, examples[:2], anatomy)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    with ActivationImportance(network, anatomy) as again, torch.no_grad():
        again.load_state_dict(state)
        for example in examples[2:]:
            network(**example)
    straight = calibrate(network, examples, anatomy).scores()
    assert again.examples == len(examples)
    assert all(torch.equal(score, straight[name]) for name, score in again.scores().items())
    other = made("gpt2", seed=5)
    with ActivationImportance(other, survey(other)) as stranger, refused(what="another network"):
        stranger.load_state_dict(state)


def test_positional_arguments_choices_and_other_dtypes() -> None:
    network = made("bert")
    anatomy = survey(network)
    batch, _ = batch_of("bert")
    wanted = calibrate(network, [batch], anatomy).scores()
    with ActivationImportance(network, anatomy) as importance, torch.no_grad():
        network(batch["input_ids"], batch["attention_mask"])
    half = calibrate(copy.deepcopy(network).bfloat16(), [batch], anatomy).scores()
    for name, score in importance.scores().items():
        torch.testing.assert_close(score, wanted[name], rtol=1e-5, atol=1e-7)
        assert half[name].dtype == torch.float64
        if name.endswith("ffn"):
            torch.testing.assert_close(half[name], wanted[name], rtol=0.1, atol=0.1)
    choice = made("bert", head="BertForMultipleChoice")
    both = {name: value.view(2, 2, -1) for name, value in batch.items()}
    scores = calibrate(choice, [both], survey(choice, both))
    flat = calibrate(choice.bert, [batch], survey(choice.bert)).scores()
    for name, score in flat.items():
        torch.testing.assert_close(scores.scores()[name], score, rtol=1e-5, atol=1e-7)
    assert scores.examples == 4


def test_what_cannot_be_measured_is_refused() -> None:
    network = made("bert")
    anatomy = survey(network)
    batch, _ = batch_of("bert")
    with refused(where="calibrate(batches=...)", got="none"):
        calibrate(network, [], anatomy)
    with refused(where="calibrate(batches=...)", got="tuple"):
        calibrate(network, [(batch["input_ids"],)], anatomy)  # type: ignore[list-item]
    with refused(where="calibrate(limit=...)", got="0"):
        calibrate(network, [batch], anatomy, limit=0)
    with refused(where="attention_mask", got="(4, 1, 7, 7)"):
        calibrate(network, [batch | {"attention_mask": torch.ones(4, 1, 7, 7)}], anatomy)
    with refused(what="never ran", got="no batch"), ActivationImportance(network, anatomy) as empty:
        empty.scores()
    with (
        refused(what="runs by itself", where="encoder.layer.0"),
        ActivationImportance(network, anatomy),
    ):
        network.encoder.layer[0](torch.zeros(1, 2, network.config.hidden_size))
    other = made("bert", seed=5)
    with refused(what="not that of this network", where="word_embeddings"):
        ActivationImportance(other, anatomy)
    with torch.no_grad():
        network.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with refused(what="not finite", where="layers.2.heads, unit 0"):
        calibrate(network, [batch], anatomy).scores()


def test_tokens_behind_the_end_may_hold_anything() -> None:
    x = torch.tensor([[[3.0, 4.0], [float("nan"), 1.0]], [[1.0, 0.0], [0.0, 2.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    index = torch.tensor([[0, 1]])
    squares, count = channel_squares(x, index, mask)
    assert squares.tolist() == [5.0**2 + 1.5**2]
    assert count == 3
    assert channel_squares(x, index, torch.zeros(2, 2, dtype=torch.bool))[0].tolist() == [0.0]
    total, count = turns(x, x.flip(-1), mask)
    assert total.item() == pytest.approx(1 - 24 / 25 + 1 + 1)
    assert count == 3
