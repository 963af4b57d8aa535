"""Smaller dense networks: as many parameters as asked for, of the same family and depth."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.tasks.smaller import count_parameters, smaller_config
from tests.refusals import refused

LLAMA = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
    "tie_word_embeddings": True,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 258,
    "n_embd": 192,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": 256,
}
NAMES = {
    "llama": ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"),
    "gpt2": ("n_embd", "n_head", "n_inner", "n_layer"),
}
# One wide head, and heads whose size is written down.
ONE_HEAD = LLAMA | {"num_attention_heads": 1, "num_key_value_heads": 1}
STORED = LLAMA | {"head_dim": 48}


@settings(max_examples=12)
@given(st.sampled_from([LLAMA, GPT2, ONE_HEAD, STORED]), st.floats(0.03, 1.0))
def test_the_size_is_what_was_asked_for(config, density):
    total = count_parameters("causal", config)
    wanted = round(density * total)
    found = smaller_config("causal", config, wanted)
    size = count_parameters("causal", found)
    assert abs(size - wanted) <= 0.02 * wanted
    hidden, heads, neurons, depth = NAMES[config["model_type"]]
    assert found[depth] == config[depth]
    assert found[hidden] % found[heads] == 0
    assert found[hidden] <= config[hidden]
    # no other number of neurons comes nearer
    for other in (found[neurons] - 1, found[neurons] + 1):
        if other > 0:
            beside = count_parameters("causal", found | {neurons: other})
            assert abs(beside - wanted) >= abs(size - wanted)


@settings(max_examples=12)
@given(st.sampled_from([LLAMA, GPT2]), st.integers(50, 95))
def test_layers_keep_their_proportions_roughly(config, percent):
    found = smaller_config("causal", config, count_parameters("causal", config) * percent // 100)
    hidden, _, neurons, _ = NAMES[config["model_type"]]
    before = config.get(neurons, 4 * config[hidden]) / config[hidden]
    assert 0.5 < found[neurons] / found[hidden] / before < 2


def test_heads_keep_their_size_and_their_groups():
    found = smaller_config("causal", LLAMA, count_parameters("causal", LLAMA) // 2)
    assert found["hidden_size"] // found["num_attention_heads"] == 32
    assert found["num_attention_heads"] % found["num_key_value_heads"] == 0
    assert found["num_key_value_heads"] < LLAMA["num_key_value_heads"]


def test_masked_models_become_narrower_too():
    bert = {"model_type": "bert", "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2}
    bert |= {"num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 32}
    found = smaller_config("masked", bert, 60_000)
    assert count_parameters("masked", found) == pytest.approx(60_000, rel=0.01)


def test_a_network_that_keeps_everything_stays():
    found = smaller_config("causal", LLAMA, count_parameters("causal", LLAMA))
    assert count_parameters("causal", found) == count_parameters("causal", LLAMA)


def test_what_cannot_be_narrower_is_refused():
    with refused(what="no narrower network", got="99 parameters"):
        smaller_config("causal", LLAMA, 99)
    with refused(what="no narrower network"):
        smaller_config("causal", LLAMA, 10**9)
    with refused(what="not known how", got="model_type: mamba", fix="small_dense"):
        smaller_config("causal", {"model_type": "mamba", "vocab_size": 9}, 1000)
    with refused(what="not known how", got="nothing_known"):
        smaller_config("causal", {"model_type": "nothing_known"}, 1000)
