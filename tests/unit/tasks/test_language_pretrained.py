import pytest
import torch
from jsonargparse import Namespace
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

from lightning_prune.cli.packaged import locate_all
from lightning_prune.tasks import CausalLM, MaskedLM
from lightning_prune.tasks.packaged import locate
from lightning_prune.tasks.pretrained import Pretrained, load_network, named_tokenizer, source_of
from tests.refusals import refused
from tests.unit.tasks import tiny_language as tiny


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny.LLAMA)).save_pretrained(folder)
    tiny.causal_tokenizer().save_pretrained(folder)
    return str(folder)


def load(objective="causal", source=None, config=None, pretrained=True, dtype=torch.float32):
    found = None if source is None else Pretrained.find(source)
    return load_network(objective, found, config=config, pretrained=pretrained, dtype=dtype)


def test_names_mean_a_folder_a_file_or_the_hub(tmp_path):
    assert Pretrained.find("owner/name") == Pretrained(name="owner/name")
    assert Pretrained.find("owner/name", "x.gguf").arguments == {"gguf_file": "x.gguf"}
    assert Pretrained.find(str(tmp_path)) == Pretrained(name=str(tmp_path))
    file = tmp_path / "a.gguf"
    file.touch()
    alone = Pretrained(name=str(tmp_path), gguf_file="a.gguf")
    assert Pretrained.find(str(file)) == Pretrained.find(str(tmp_path)) == alone
    (tmp_path / "b.gguf").touch()
    with refused(what="not clear which", got="a.gguf, b.gguf", fix="gguf_file='a.gguf'"):
        Pretrained.find(str(tmp_path))
    assert Pretrained.find(str(tmp_path), "b.gguf").gguf_file == "b.gguf"
    (tmp_path / "config.json").touch()
    assert Pretrained.find(str(tmp_path)).gguf_file is None


def test_packages_hold_models_too():
    assert Pretrained.find("package:lightning_prune").name == locate("package:lightning_prune")
    with refused(what="no such package"):
        Pretrained.find("package:no_such_package")
    with refused(what="holds nothing"):
        Pretrained.find("package:lightning_prune/x.gguf")


def test_weights_are_loaded_changed_in_type_or_drawn_anew(llama_path):
    saved = load(source=llama_path)
    again = load(source=llama_path, config={"attention_dropout": 0.5})
    assert again.config.attention_dropout == 0.5
    weight = saved.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, again.model.layers[0].mlp.up_proj.weight)
    half = load(source=llama_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.manual_seed(5)  # the saved weights come from another
    fresh = load(source=llama_path, pretrained=False)
    assert fresh.config.hidden_size == 16
    assert not torch.equal(weight, fresh.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("config", [tiny.GPT2, tiny.LLAMA])
def test_new_weights_depend_on_the_seed_alone(config):
    def weights(seed, drawn):
        torch.manual_seed(seed)
        torch.rand(drawn)
        state = torch.get_rng_state()
        found = torch.cat([p.flatten() for p in load(config=config).parameters()])
        assert torch.equal(torch.get_rng_state(), state)
        return found

    assert torch.equal(weights(3, 0), weights(3, 10))
    assert not torch.equal(weights(3, 0), weights(4, 0))


def test_values_that_follow_from_others_follow():
    network = load(config=tiny.LLAMA | {"hidden_size": 32})
    assert network.config.head_dim == 8
    assert load("masked", config=tiny.BERT).config.vocab_size == 17


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"source": "/no/such/folder"}, {"what": "cannot be loaded", "got": "/no/such/folder"}),
        ({"config": {"hidden_size": 16}}, {"fix": "model_type"}),
        ({"config": {"model_type": "nothing"}}, {"what": "cannot be loaded"}),
        ({"config": tiny.LLAMA | {"depth": 3}}, {"what": "no such value", "got": "depth"}),
        ({"config": tiny.BERT}, {"what": "An encoder sees", "fix": "MaskedLM"}),
        ({"config": tiny.LLAMA, "objective": "masked"}, {"allowed": "AutoModelForMaskedLM"}),
    ],
)
def test_models_that_there_are_not_are_refused(arguments, expected):
    with refused(**expected):
        load(**arguments)


def test_an_encoder_may_be_made_a_decoder():
    network = load(config=tiny.BERT | {"is_decoder": True}).eval()
    ids = torch.tensor([[7, 8, 9], [7, 8, 10]])
    with torch.no_grad():
        logits = network(input_ids=ids).logits
    assert torch.allclose(logits[0, :2], logits[1, :2])


def test_weights_that_are_not_there_are_refused(tmp_path):
    BertForMaskedLM(BertConfig(**tiny.BERT)).save_pretrained(tmp_path)
    assert load("masked", str(tmp_path)).config.vocab_size == 17
    with refused(what="not all there", got="layer.2", fix="pretrained=False"):
        load("masked", str(tmp_path), config={"num_hidden_layers": 3})
    with refused(what="cannot be loaded"):
        load("masked", str(tmp_path), config={"intermediate_size": 48})


def test_a_gguf_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind" * 9)
    with refused(what="model cannot be loaded"):
        load(source=str(tmp_path))
    with refused(what="tokenizer cannot be loaded"):
        named_tokenizer(str(tmp_path))


def test_tokenizers_are_found_by_name(llama_path, tmp_path):
    assert named_tokenizer(llama_path).eos_token == "<eos>"
    given = tiny.causal_tokenizer()
    assert named_tokenizer(given) is given
    assert given.pad_token is None  # it is left as it is
    with refused(what="tokenizer cannot be loaded"):
        named_tokenizer(str(tmp_path))


def test_the_source_of_a_model_is_known(llama_path):
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    assert source_of(Around(CausalLM(llama_path, gguf_file="x.gguf"))) == (llama_path, "x.gguf")
    assert source_of(Around(load(source=llama_path))) == (llama_path, None)
    for unknown in (None, CausalLM(config=tiny.LLAMA), nn.Linear(1, 1)):
        with refused(what="not known how to tokenise"):
            source_of(unknown)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"where": "CausalLM(model", "fix": "model_type"}),
        ({"model": "x", "dtype": "float16"}, {"where": "dtype", "allowed": "float32, bfloat16"}),
        ({"model": nn.Linear(2, 2), "pretrained": False}, {"fix": "change the network itself"}),
        ({"model": nn.Linear(2, 2), "config": {"a": 1}}, {"got": "{'a': 1}"}),
    ],
)
def test_modules_that_there_are_not_are_refused(arguments, expected):
    with refused(**expected):
        CausalLM(**arguments)


def test_checkpointing_needs_a_model_that_can():
    with refused(where="gradient_checkpointing", got="Linear"):
        MaskedLM(nn.Linear(2, 2), gradient_checkpointing=True)


def test_configurations_keep_the_short_names_of_the_language_tasks():
    short = "package:lightning_prune/py.typed"
    own = Namespace(class_path="lightning_prune.tasks.CausalLM", init_args=Namespace(model=short))
    other = Namespace(class_path="other.CausalLM", init_args=Namespace(model=short))
    found = locate_all(Namespace(model=own, data=other, many=[own, {"a": short}]))
    assert found.model.init_args.model == short
    assert found.data.init_args.model == locate(short)
    assert found.many[0].init_args.model == short
    assert found.many[1]["a"] == locate(short)
