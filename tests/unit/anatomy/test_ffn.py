"""Feed-forward neurons of the model families, found by name and proven by what the model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.anatomy import ffn_followers, find_ffn
from lightning_prune.followers import Members, followed
from lightning_prune.targets import select
from tests.refusals import refused

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = SMALL | {"num_attention_heads": 4, "intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": HEADS,
    "roberta": HEADS,
    "distilbert": {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    "vit": HEADS | {"image_size": 8, "patch_size": 4, "num_channels": 1},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "opt": SMALL | {"num_attention_heads": 4, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt_neox": HEADS,
    "llama": HEADS | {"num_key_value_heads": 2},
    "mistral": HEADS | {"num_key_value_heads": 2},
    "qwen2": HEADS | {"num_key_value_heads": 2},
    "qwen3": HEADS | {"num_key_value_heads": 2, "head_dim": 4},
    "gemma2": HEADS | {"num_key_value_heads": 2, "head_dim": 4},
    "t5": {"vocab_size": 40, "d_model": 16, "d_kv": 4, "num_heads": 4, "num_layers": 2, "d_ff": 24},
}
WAYS = {
    **dict.fromkeys(("bert", "roberta"), ("intermediate.dense", "output.dense")),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2"), ("gate_proj", "up_proj", "down_proj")
    ),
    "distilbert": ("ffn.lin1", "ffn.lin2"),
    "vit": ("fc1", "fc2"),
    "gpt2": ("c_fc", "c_proj"),
    "opt": ("fc1", "fc2"),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h"),
    "t5": ("wi", "wo"),
    "t5 gated": ("wi_0", "wi_1", "wo"),
}
BIASES = {"bert", "roberta", "distilbert", "vit", "gpt2", "opt", "gpt_neox"}
FAMILIES["t5 gated"] = FAMILIES["t5"] | {"feed_forward_proj": "gated-gelu"}


def made(family: str, **more: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    kind = family.partition(" ")[0]
    model = AutoModel.from_config(AutoConfig.for_model(kind, **FAMILIES.get(family, {}), **more))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def said(model: nn.Module, family: str) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if family == "vit":
            return model(pixel_values=torch.randn(2, 1, 8, 8, generator=draw)).last_hidden_state
        ids = torch.randint(2, 40, (2, 7), generator=draw)
        more = {"decoder_input_ids": ids} if family.startswith("t5") else {}
        return model(input_ids=ids, **more).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neuron_is_its_rows_its_column_and_its_bias(family):
    """With its columns zero, nothing that is said depends on what else is zeroed with them."""
    model = made(family)
    targets = select(
        model, exclude="*pooler*" if "pooler" in dict(model.named_children()) else None
    )
    blocks = find_ffn(model, targets.targets)
    assert len(blocks) == (4 if family.startswith("t5") else 2)
    followers = ffn_followers(model, targets.targets)
    members = Members(targets.targets, followers)
    leaders = {f.leader for f in followers}
    dense = said(model, family)
    draw = torch.Generator().manual_seed(2)
    changes = []
    for target in members.ranked:
        if target.name in leaders:
            rows = torch.rand(target.canonical_shape[1], generator=draw) > 0.4
            mask = torch.empty(target.shape, dtype=torch.bool)
            target.canonical(mask).copy_(rows.view(1, -1, 1, 1).expand(target.canonical_shape))
            changes.append((target, mask))
    columns = {f.target.name for f in followers if f.axis == "columns"}
    zeroed = list(followed(changes, followers))
    for block in blocks:
        prefix = block.output.removesuffix(f"{WAYS[family][-1]}.weight")
        mine = {f.target.name for f in followers if f.leader == block.inputs[0]}
        assert {block.inputs[0], *mine} == {
            *(f"{prefix}{way}.weight" for way in WAYS[family]),
            *(f"{prefix}{way}.bias" for way in WAYS[family][:-1] if family in BIASES),
        }
    for target, mask in zeroed:
        if target.name in columns:
            target.local.mul_(mask)
    without = said(model, family)
    assert not torch.allclose(without, dense, atol=1e-3)
    for target, mask in zeroed:
        target.local.mul_(mask)
    torch.testing.assert_close(said(model, family), without)


def test_a_fused_gate_is_refused():
    model = made("phi3", **HEADS, num_key_value_heads=2, pad_token_id=0)
    with refused(where="gate_up_proj", got="two rows", allowed="two Linear", fix="units out"):
        find_ffn(model, select(model).targets)


def test_other_shapes_and_shared_ways_in_are_refused():
    net = nn.ModuleDict({"fc1": nn.Linear(8, 24), "fc2": nn.Linear(12, 8)})
    with refused(where="fc1", got="24x8", allowed="as many outputs", fix="exclude"):
        find_ffn(net, select(net).targets)
    one, two = (nn.ModuleDict({"fc1": nn.Linear(8, 12), "fc2": nn.Linear(12, 8)}) for _ in "ab")
    two["fc1"] = one["fc1"]
    net = nn.ModuleList([one, two])
    with refused(where="1.fc2", got="1.fc1.weight", allowed="all weights", fix="all or none"):
        find_ffn(net, select(net).targets)


def test_torchs_own_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    found = ffn_followers(layer, select(layer, exclude="self_attn*").targets)
    assert {f.target.name: f.axis for f in found} == {
        "linear2.weight": "columns",
        "linear1.bias": "rows",
    }
