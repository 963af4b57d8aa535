"""One row per model family: where heads, neurons, norms and layers stand, and what a config holds.

Paths in a row are relative: those of an attention's projections to its block, all others to one
layer. `infer` writes such a row for a network that has none, from names and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_prune.anatomy.kinds import Kind

__all__ = ["FAMILIES", "Attention", "Family", "FeedForward", "Skip", "Stack", "family_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Where the heads of a layer are.

    Attributes:
        block: The module that splits into heads and gives (output, weights).
        query: Projection to queries; with ``fused``, all three in one matrix.
        key: Projection to keys, "" when fused.
        value: Projection to values, "" when fused.
        output: Projection back, relative to the layer.
        fused: How one matrix holds all three: queries, keys and values one after the other
            ("parts"), or for each head its query, key and value ("heads").
        table: An embedding with one column per head, in the block.
        norms: Norms over one head's dimensions, in the block.
        shared: Whether all layers must keep the same heads, since they share a position bias.
        group: What its heads are called in kept sets.
    """

    block: str
    query: str
    key: str = ""
    value: str = ""
    output: str
    fused: Literal["", "parts", "heads"] = ""
    table: str = ""
    norms: tuple[str, ...] = ()
    shared: bool = False
    group: str = "heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """Where the neurons of a layer are.

    Attributes:
        inputs: Projections whose outputs are the neurons.
        output: The projection whose inputs are the neurons.
        fused: Whether the one input projection holds gates and neurons, one after the other.
    """

    inputs: tuple[str, ...]
    output: str
    fused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """How a sub-layer is left out: some modules give zero, and norms hand their input on."""

    silenced: tuple[str, ...]
    passed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A list of like layers.

    Attributes:
        layers: Path of the ModuleList in the base model.
        attentions: The attentions of each layer.
        ffn: Alternatives for the feed-forward block; the first one that is there counts.
        attention_skip: How the attention sub-layer is left out; None where it cannot be.
        mlp_skip: How the feed-forward sub-layer is left out.
        depth: The config's field with the number of layers.
        name: What comes before ``layers`` in kept sets.
    """

    layers: str
    attentions: tuple[Attention, ...]
    ffn: tuple[FeedForward, ...]
    attention_skip: Skip | None
    mlp_skip: Skip | None
    depth: str = "num_hidden_layers"
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The row of a family.

    Attributes:
        types: Values of ``config.model_type``.
        stacks: Its lists of layers.
        writers: Globs over modules outside the layers whose outputs are residual-stream channels.
        width: The config's field with the number of neurons.
        stock: Kinds of units that the stock config can hold when all layers keep as many.
        stored_head_dim: Whether the config has a field for a head's size; otherwise it is the
            hidden size over the number of heads, which a stock model must keep.
    """

    types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    writers: tuple[str, ...] = ()
    width: str = "intermediate_size"
    stock: tuple[Kind, ...] = ("heads", "ffn", "hidden", "layers")
    stored_head_dim: bool = False


_GATED = FeedForward(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj")
_GQA: tuple[Kind, ...] = ("heads", "query_heads", "ffn", "hidden", "layers")


def _llama(*, norms: tuple[str, ...] = (), sandwich: bool = False, fused: bool = False) -> Stack:
    before = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    return Stack(
        layers="layers",
        attentions=(
            Attention(
                block="self_attn",
                query="qkv_proj" if fused else "q_proj",
                key="" if fused else "k_proj",
                value="" if fused else "v_proj",
                fused="parts" if fused else "",
                output="self_attn.o_proj",
                norms=norms,
            ),
        ),
        ffn=(
            FeedForward(inputs=("mlp.gate_up_proj",), output="mlp.down_proj", fused=True)
            if fused
            else _GATED,
        ),
        attention_skip=Skip(
            silenced=("self_attn",),
            passed=("input_layernorm", *(("post_attention_layernorm",) if sandwich else ())),
        ),
        mlp_skip=Skip(
            silenced=("mlp",), passed=before if sandwich else ("post_attention_layernorm",)
        ),
    )


_BERT = Stack(
    layers="encoder.layer",
    attentions=(
        Attention(
            block="attention.self",
            query="query",
            key="key",
            value="value",
            output="attention.output.dense",
        ),
    ),
    ffn=(FeedForward(inputs=("intermediate.dense",), output="output.dense"),),
    attention_skip=Skip(
        silenced=("attention.self", "attention.output.dense"),
        passed=("attention.output.LayerNorm",),
    ),
    mlp_skip=Skip(silenced=("intermediate", "output.dense"), passed=("output.LayerNorm",)),
)


def _t5(name: str) -> Stack:
    decoder = name == "decoder"
    place = "layer.2" if decoder else "layer.1"

    def attention(block: str, group: str) -> Attention:
        return Attention(
            block=block,
            query="q",
            key="k",
            value="v",
            output=f"{block}.o",
            table="relative_attention_bias",
            shared=True,
            group=group,
        )

    own = attention("layer.0.SelfAttention", "heads")
    cross = attention("layer.1.EncDecAttention", "cross_heads")
    ffn = f"{place}.DenseReluDense"
    return Stack(
        layers=f"{name}.block",
        name=f"{name}.",
        attentions=(own, cross) if decoder else (own,),
        ffn=(
            FeedForward(inputs=(f"{ffn}.wi",), output=f"{ffn}.wo"),
            FeedForward(inputs=(f"{ffn}.wi_0", f"{ffn}.wi_1"), output=f"{ffn}.wo"),
        ),
        attention_skip=None,  # the first layer's attention makes the position bias of all
        mlp_skip=Skip(silenced=(ffn,), passed=(f"{place}.layer_norm",)),
        depth="num_decoder_layers" if decoder else "num_hidden_layers",
    )


FAMILIES: tuple[Family, ...] = (
    Family(types=("bert",), stacks=(_BERT,), writers=("cls.predictions.transform.dense",)),
    Family(
        types=("roberta", "xlm-roberta", "camembert"), stacks=(_BERT,), writers=("lm_head.dense",)
    ),
    Family(
        types=("distilbert",),
        stacks=(
            Stack(
                layers="transformer.layer",
                attentions=(
                    Attention(
                        block="attention",
                        query="q_lin",
                        key="k_lin",
                        value="v_lin",
                        output="attention.out_lin",
                    ),
                ),
                ffn=(FeedForward(inputs=("ffn.lin1",), output="ffn.lin2"),),
                attention_skip=Skip(silenced=("attention",), passed=("sa_layer_norm",)),
                mlp_skip=Skip(silenced=("ffn",), passed=("output_layer_norm",)),
            ),
        ),
        writers=("vocab_transform",),
        width="hidden_dim",
    ),
    Family(
        types=("vit",),
        stacks=(
            Stack(
                layers="layers",
                attentions=(
                    Attention(
                        block="attention",
                        query="q_proj",
                        key="k_proj",
                        value="v_proj",
                        output="attention.o_proj",
                    ),
                ),
                ffn=(FeedForward(inputs=("mlp.fc1",), output="mlp.fc2"),),
                attention_skip=Skip(silenced=("attention",), passed=("layernorm_before",)),
                mlp_skip=Skip(silenced=("mlp",), passed=("layernorm_after",)),
            ),
        ),
        stored_head_dim=True,
    ),
    Family(
        types=("gpt2",),
        stacks=(
            Stack(
                layers="h",
                attentions=(
                    Attention(block="attn", query="c_attn", fused="parts", output="attn.c_proj"),
                ),
                ffn=(FeedForward(inputs=("mlp.c_fc",), output="mlp.c_proj"),),
                attention_skip=Skip(silenced=("attn",), passed=("ln_1",)),
                mlp_skip=Skip(silenced=("mlp",), passed=("ln_2",)),
            ),
        ),
        width="n_inner",
    ),
    Family(
        types=("opt",),
        stacks=(
            Stack(
                layers="decoder.layers",
                attentions=(
                    Attention(
                        block="self_attn",
                        query="q_proj",
                        key="k_proj",
                        value="v_proj",
                        output="self_attn.out_proj",
                    ),
                ),
                ffn=(FeedForward(inputs=("fc1",), output="fc2"),),
                attention_skip=Skip(silenced=("self_attn",), passed=("self_attn_layer_norm",)),
                mlp_skip=Skip(silenced=("fc1", "fc2"), passed=("final_layer_norm",)),
            ),
        ),
        writers=("*.project_in",),
        width="ffn_dim",
    ),
    Family(types=("llama",), stacks=(_llama(),), stock=_GQA, stored_head_dim=True),
    Family(types=("mistral",), stacks=(_llama(),), stock=_GQA, stored_head_dim=True),
    Family(types=("qwen2",), stacks=(_llama(),), stock=_GQA, stored_head_dim=True),
    Family(
        types=("qwen3",),
        stacks=(_llama(norms=("q_norm", "k_norm")),),
        # one field holds the epsilon of all norms: that of the stream's changes with its width
        stock=("heads", "query_heads", "ffn", "layers"),
        stored_head_dim=True,
    ),
    Family(
        types=("gemma2",),
        stacks=(_llama(sandwich=True),),
        # its embeddings are multiplied by the root of the hidden size
        stock=("heads", "query_heads", "ffn", "layers"),
        stored_head_dim=True,
    ),
    Family(types=("phi3",), stacks=(_llama(fused=True),), stock=_GQA, stored_head_dim=True),
    Family(
        types=("gpt_neox",),
        stacks=(
            Stack(
                layers="layers",
                attentions=(
                    Attention(
                        block="attention",
                        query="query_key_value",
                        fused="heads",
                        output="attention.dense",
                    ),
                ),
                ffn=(FeedForward(inputs=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h"),),
                attention_skip=Skip(silenced=("attention",), passed=("input_layernorm",)),
                mlp_skip=Skip(silenced=("mlp",), passed=("post_attention_layernorm",)),
            ),
        ),
    ),
    Family(
        types=("t5",),
        stacks=(_t5("encoder"), _t5("decoder")),
        width="d_ff",
        # d_model also scales the logits of tied embeddings
        stock=("heads", "ffn", "layers"),
        stored_head_dim=True,
    ),
)


def family_of(model_type: str) -> Family | None:
    """The row of a model type; None where there is none."""
    return next((f for f in FAMILIES if model_type in f.types), None)
