import json
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_prune.errors import PruneError
from lightning_prune.reports import LatencyReport, LatencyRow, Speedup, latency
from tests.refusals import refused

SAME = Speedup(low=0.98, median=1.0, high=1.02)
FASTER = Speedup(low=1.7, median=1.8, high=1.9)
SLOWER = Speedup(low=0.4, median=0.5, high=0.6)


def row(name: str, *speedups: Speedup, parameters=1000, zeros=0, macs=8000) -> LatencyRow:
    batches = (1, 32)[: len(speedups)]
    return LatencyRow(
        name=name,
        parameters=parameters,
        zeros=zeros,
        macs=macs,
        milliseconds={b: 2.0 * b for b in batches},
        per_second=dict.fromkeys(batches, 5e3),
        speedups=dict(zip(batches, speedups, strict=True)),
    )


def made(*rows: LatencyRow) -> LatencyReport:
    return LatencyReport(rows=rows, unit="tokens", length=64, runs=20, device="cpu, 1 thread")


DENSE = row("dense", SAME, SAME)


def bert(**more):
    from transformers import BertConfig, BertModel

    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
    }
    return BertModel(BertConfig(**sizes | more))


def shown(thing: object) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


# What is measured -----------------------------------------------------------------------------


def test_every_multiplication_of_a_transformer_counts():
    found = latency({"net": bert()}, batches=(1, 3), length=8, runs=2)
    (net,) = found.rows
    tokens, width, neurons = 8, 32, 64
    layer = tokens * (4 * width * width + 2 * width * neurons) + 2 * tokens * tokens * width
    assert net.macs == 2 * layer + width * width  # and the pooler on one token
    assert net.parameters == sum(p.numel() for p in bert().parameters())
    assert (found.unit, found.length) == ("tokens", 8)


def test_lengths_are_cut_to_what_the_model_takes():
    assert latency({"net": bert()}, batches=(1,), length=99, runs=1).length == 16


def test_tokens_a_second_follow_from_milliseconds():
    found = latency({"net": bert()}, batches=(1, 3), length=8, runs=3)
    (net,) = found.rows
    assert list(net.milliseconds) == [1, 3]
    for batch, milliseconds in net.milliseconds.items():
        assert net.per_second[batch] == pytest.approx(batch * 8 / milliseconds * 1000)


def test_images_and_own_inputs():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    found = latency({"net": ViTModel(config)}, batches=(2,), runs=1)
    assert (found.unit, found.length) == ("images", None)
    seen: list[tuple[int, ...]] = []
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    net[0].register_forward_hook(lambda _, given, output: seen.append(tuple(given[0].shape)))
    found = latency({"net": net}, {"input": torch.randn(2, 3, 8, 8)}, batches=(1, 5), runs=1)
    assert found.unit == "examples"
    assert found.rows[0].macs == 36 * 4 * 27 + 4 * 36 * 2
    assert {shape[0] for shape in seen} == {1, 5}


def test_models_run_in_turns_in_evaluation_mode_and_are_left_as_they_were():
    order: list[str] = []
    modes: set[tuple[bool, bool]] = set()
    nets = {name: nn.Sequential(nn.Linear(4, 4), nn.Dropout()) for name in "ab"}
    nets["b"][0].eval()
    for name, net in nets.items():

        def note(module, given, name=name):
            order.append(name)
            modes.add((module.training, torch.is_grad_enabled()))

        net.register_forward_pre_hook(note)
    batch = {"input": torch.randn(2, 4)}
    before = torch.get_rng_state()
    latency(nets, batch, batches=(2,), runs=4)
    assert order[-8:] == ["a", "b"] * 4
    assert modes == {(False, False)}
    assert [[m.training for m in net] for net in nets.values()] == [[True, True], [False, True]]
    assert torch.equal(torch.get_rng_state(), before)


def test_speed_ups_are_ratios_of_neighbouring_runs(monkeypatch):
    # a slow machine in the second half: ratios of medians would say 1.0 for both halves mixed
    durations = {"dense": [2.0, 2.0, 20.0, 20.0], "small": [1.0, 1.0, 10.0, 10.0]}
    ticks = []
    for pair in zip(*durations.values(), strict=True):
        for seconds in pair:
            ticks += [0.0, seconds]
    clock = iter(ticks)
    module = sys.modules["lightning_prune.reports.latency"]  # where the function hides its name
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    nets = {name: nn.Linear(2, 2) for name in durations}
    found = latency(nets, {"input": torch.ones(1, 2)}, batches=(1,), runs=4)
    dense, small = found.rows
    assert (small.speedups[1].low, small.speedups[1].median, small.speedups[1].high) == (2, 2, 2)
    assert dense.speedups[1].median == 1
    assert (dense.milliseconds[1], small.milliseconds[1]) == (11_000, 5_500)


# What is said ---------------------------------------------------------------------------------


def test_half_the_model_in_one_sentence():
    found = made(DENSE, row("small", SAME, FASTER, parameters=500, macs=4000))
    assert found.verdict == (
        "small is no faster at batch 1 and 1.80x faster at batch 32, with 50% of the parameters "
        "and 50% of the MACs of dense, where the MACs alone would allow 2.00x; see docs/faster.md"
    )


def test_zeros_that_are_still_multiplied():
    found = made(DENSE, row("masked", SAME, SAME, zeros=800))
    assert found.verdict == (
        "nothing got faster: masked has 100% of the parameters and 100% of the MACs of dense, "
        "and the zeros are still multiplied; see docs/faster.md"
    )


def test_smaller_and_yet_no_faster():
    found = made(DENSE, row("small", SAME, SLOWER, parameters=500, macs=4000))
    assert found.verdict == (
        "nothing got faster (no faster at batch 1 and 2.00x slower at batch 32), although small "
        "has 50% of the parameters and 50% of the MACs of dense; see docs/faster.md"
    )


def test_several_models_and_one_alone():
    small = row("small", FASTER, FASTER, parameters=500, macs=4000)
    found = made(DENSE, row("masked", SAME, SAME, zeros=9), small).verdict
    assert found.startswith("masked got no faster: masked has 100%")
    assert "; small is 1.80x faster at batch 1 and 1.80x faster at batch 32" in found
    assert "docs" not in made(DENSE, small).verdict
    assert "nothing to compare" in made(DENSE).verdict


@pytest.mark.parametrize(
    ("low", "median", "high", "word"),
    [
        (1.06, 1.08, 1.1, "1.08x faster"),
        (1.01, 1.04, 1.1, "no faster"),
        (0.99, 1.5, 2.0, "no faster"),
        (0.4, 0.5, 0.6, "2.00x slower"),
        (0.4, 0.5, 1.1, "no faster"),
        (0.9, 0.97, 0.99, "no faster"),
    ],
)
def test_noise_is_not_called_faster(low, median, high, word):
    assert Speedup(low=low, median=median, high=high).word == word


def test_tables_dict_and_json_say_the_same(tmp_path):
    small = row("[red]", FASTER, FASTER, parameters=500, zeros=50, macs=4000)
    found = made(DENSE, small)
    for text in (str(found), shown(found)):
        lines = [line.split() for line in text.splitlines()]
        assert ["[red]", "500", "10%", "4k", "1", "2", "5k", "1.80x"] in lines
        assert ["32", "64", "5k", "1.80x"] in lines
        assert "1.80x faster at batch 1" in text
        assert "medians of 20 interleaved runs on cpu, 1 thread, 64 tokens each" in text
    assert max(len(line.rstrip()) for line in shown(found).splitlines()) <= 80
    assert "speed-up" not in str(made(DENSE))
    found.to_json(tmp_path / "latency.json")
    read = json.loads((tmp_path / "latency.json").read_text())
    assert read == found.to_dict()
    assert read["verdict"] == found.verdict
    assert read["models"][1]["batches"][1] == {
        "batch": 32,
        "milliseconds": 64.0,
        "per_second": 5e3,
        "speedup": 1.8,
        "speedup_quartiles": [1.7, 1.9],
    }


def test_the_plot_has_a_panel_for_each_batch_size(tmp_path):
    small = row("small", FASTER, SAME, parameters=500)
    _, panels = made(DENSE, small).plot(tmp_path / "latency.png")
    assert [axes.get_title(loc="left") for axes in panels] == ["batch 1", "batch 32"]
    assert [bar.get_width() for bar in panels[1].containers[0]] == [64, 64]
    words = [[text.get_text() for text in axes.texts] for axes in panels]
    assert words == [["2 ms", "2 ms, 1.80x faster"], ["64 ms", "64 ms, no faster"]]
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


# What is refused ------------------------------------------------------------------------------


def test_refusals(monkeypatch):
    net, batch = nn.Linear(2, 2), {"input": torch.ones(1, 2)}
    with refused(where="batches", got="(0,)", allowed="1 or more", fix="default"):
        latency({"net": net}, batch, batches=(0,))
    with refused(where="batches", got="()", allowed="at least one"):
        latency({"net": net}, batch, batches=())
    with refused(where="runs", got="0"):
        latency({"net": net}, batch, runs=0)
    with refused(where="models", got="no model", allowed="same device", fix="models={"):
        latency({})
    with refused(where="models", got="cpu, meta", fix=".to(device)"):
        latency({"net": net, "other": nn.Linear(2, 2, device="meta")}, batch)
    with refused(where="'other'", got="RuntimeError", allowed="all the models", fix="inputs={"):
        latency({"net": net, "other": nn.Linear(3, 2)}, batch)
    with refused(where="Linear", got="no module with a transformers config"):
        latency({"net": net})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PruneError, match=r"lightning-prune\[plots\]"):
        made(DENSE).plot()
