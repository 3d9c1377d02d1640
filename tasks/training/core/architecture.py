"""What memory depends on in a decoder-only transformer: its linear layers, its widths, its vocabulary."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

Reads = Literal["attention_in", "attention_out", "mlp_in", "mlp_out"]


@dataclass(frozen=True)
class Linear:
    """One linear layer of every block; `reads` says which activation it takes, so that shared ones count once."""

    name: str
    inputs: int
    outputs: int
    reads: Reads
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Architecture:
    """Widths in elements. `norms` counts norms of one block with an input of their own, `qk_norm` those per head.

    `logits_changed`: they are scaled or squashed, so that the loss needs them whole (Granite, Cohere). `softcap`:
    attention squashes its scores (Gemma 2), so that its rows cannot be packed.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    linears: tuple[Linear, ...]
    norm_parameters: int
    norms: int = 2
    rms_norm: bool = True
    qk_norm: bool = False
    head_bias: bool = False
    logits_changed: bool = False
    softcap: bool = False
    activation: str = "silu"

    @classmethod
    def from_report(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, as a worker's report carries it."""
        return cls(**{**fields, "linears": tuple(Linear(**linear) for linear in fields["linears"])})

    @cached_property
    def linear_parameters(self) -> int:
        """Weights that NF4 quantises: every linear layer but the vocabulary projection."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @cached_property
    def other_parameters(self) -> int:
        """Embedding, vocabulary projection (once if tied), norms, biases: what NF4 leaves alone."""
        biases = self.layers * sum(linear.outputs for linear in self.linears if linear.bias)
        head = 0 if self.tied else self.hidden * self.vocab
        return self.hidden * self.vocab + head + biases + self.norm_parameters + (self.vocab if self.head_bias else 0)

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def inner(self) -> int:
        """Width between the two halves of the feed-forward part."""
        return next(linear.inputs for linear in self.linears if linear.reads == "mlp_out")

    @property
    def gated(self) -> bool:
        return sum(linear.outputs for linear in self.linears if linear.reads == "mlp_in") >= 2 * self.inner

    @property
    def swiglu(self) -> bool:
        """down(silu(gate(x)) * up(x)), in three layers of these names (arXiv 2002.05202)."""
        names = {linear.name for linear in self.linears if linear.reads in ("mlp_in", "mlp_out")}
        return self.activation == "silu" and names == {"gate_proj", "up_proj", "down_proj"}

    @property
    def fused_qkv(self) -> bool:
        return sum(linear.reads == "attention_in" for linear in self.linears) == 1


def decoder(shape: Mapping[str, Any]) -> Architecture:
    """An Architecture from the few numbers of a public config.json, as data_contracts/architectures.json keeps them.

    Llama's form unless said otherwise: `qkv_bias`, `bias` (everywhere), `fused_qkv`, `gated: false` (two linear layers
    in the feed-forward part), `rms_norm: false` (LayerNorm), `norms`, `qk_norm`, `head_bias`, `tied`, `activation`.
    """
    hidden, inner, heads = shape["hidden"], shape["inner"], shape["heads"]
    kv_heads, head_dim = shape.get("kv_heads", heads), shape.get("head_dim", hidden // heads)
    queries, keys = heads * head_dim, kv_heads * head_dim
    bias = shape.get("bias", False)
    qkv_bias, norms = bias or shape.get("qkv_bias", False), shape.get("norms", 2)
    rms_norm, qk_norm = shape.get("rms_norm", True), shape.get("qk_norm", False)
    if shape.get("fused_qkv"):
        attention = [Linear("qkv_proj", hidden, queries + 2 * keys, "attention_in", qkv_bias)]
    else:
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        attention = [Linear(name, hidden, width, "attention_in", qkv_bias) for name, width in widths.items()]
    attention.append(Linear("o_proj", queries, hidden, "attention_out", bias))
    names = ("gate_proj", "up_proj") if shape.get("gated", True) else ("up_proj",)
    mlp = [Linear(name, hidden, inner, "mlp_in", bias) for name in names]
    mlp.append(Linear("down_proj", inner, hidden, "mlp_out", bias))
    norm = (shape["layers"] * shape.get("norms_stored", norms) + 1) * hidden * (1 if rms_norm else 2)
    return Architecture(
        hidden=hidden, layers=shape["layers"], heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocab=shape["vocab"],
        tied=shape.get("tied", False), linears=(*attention, *mlp), norms=norms, rms_norm=rms_norm, qk_norm=qk_norm,
        norm_parameters=norm + (shape["layers"] * 2 * head_dim if qk_norm else 0), head_bias=shape.get("head_bias", False),
        activation=shape.get("activation", "silu"),
    )  # fmt: skip
