"""A model as the planner sees it: its matrices, and what its attention does beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openm1.planner.attention import Attention

Part = Literal["embedding", "attention", "router", "experts", "norms", "head"]
"""What a parameter belongs to; the layers' dense blocks and shared experts count as experts."""

PARTS: tuple[Part, ...] = ("embedding", "attention", "router", "experts", "norms", "head")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A matrix of `rows` outputs and `columns` inputs; a vector has one column."""

    name: str
    part: Part
    rows: int
    columns: int
    copies: int = 1
    """How many there are (experts)."""
    used: int = 1
    """How many of them one token goes through."""

    @property
    def num_params(self) -> int:
        return self.rows * self.columns * self.copies

    @property
    def num_used_params(self) -> int:
        return self.rows * self.columns * self.used

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix that a token's vector is multiplied by."""
        return self.part not in ("embedding", "norms")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedForward:
    """SwiGLU experts and their router; one expert alone is a dense block without a router."""

    width: int
    num_experts: int = 1
    num_experts_per_tok: int = 1
    shared_width: int = 0
    """Of the expert that every token goes through besides; 0 is none."""
    has_router_bias: bool = False

    def weights(self, hidden_size: int) -> list[Weight]:
        out = []
        if self.num_experts > 1:
            out.append(
                Weight(name="gate", part="router", rows=self.num_experts, columns=hidden_size)
            )
        if self.has_router_bias:
            # It only steers the choice of experts, and multiplies nothing.
            out.append(Weight(name="gate.bias", part="norms", rows=self.num_experts, columns=1))
        count, used = self.num_experts, self.num_experts_per_tok
        out += self._swiglu("experts", self.width, hidden_size, count, used)
        if self.shared_width:
            out += self._swiglu("shared", self.shared_width, hidden_size, 1, 1)
        return out

    @staticmethod
    def _swiglu(name: str, width: int, hidden: int, copies: int, used: int) -> list[Weight]:
        counts = {"copies": copies, "used": used}
        return [
            Weight(name=f"{name}.w1", part="experts", rows=width, columns=hidden, **counts),
            Weight(name=f"{name}.w3", part="experts", rows=width, columns=hidden, **counts),
            Weight(name=f"{name}.w2", part="experts", rows=hidden, columns=width, **counts),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    attention: Attention
    feed_forward: FeedForward

    def weights(self, hidden_size: int) -> list[Weight]:
        """Without layer numbers; the two norms of the block included."""
        attention = [
            Weight(name=name, part="norms" if columns == 1 else "attention", rows=rows,
                   columns=columns)
            for name, rows, columns in self.attention.matrices()
        ]  # fmt: skip
        norms = Weight(name="block norms", part="norms", rows=2 * hidden_size, columns=1)
        return [*attention, *self.feed_forward.weights(hidden_size), norms]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Everything that a cost depends on."""

    name: str
    hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool
    layers: tuple[Layer, ...]

    def outer_weights(self) -> list[Weight]:
        """Embedding, final norm, and the head where it is a matrix of its own."""
        table = {"rows": self.vocab_size, "columns": self.hidden_size}
        out = [
            Weight(name="embed_tokens", part="embedding", used=0, **table),
            Weight(name="norm", part="norms", rows=self.hidden_size, columns=1),
        ]
        if not self.tie_word_embeddings:
            out.append(Weight(name="lm_head", part="head", **table))
        return out

    def layer_weights(self) -> list[Weight]:
        """Of all layers, one after the other."""
        return [weight for layer in self.layers for weight in layer.weights(self.hidden_size)]

    def weights(self) -> list[Weight]:
        return [*self.outer_weights(), *self.layer_weights()]

    @property
    def num_params(self) -> int:
        return sum(weight.num_params for weight in self.weights())

    @property
    def num_active_params(self) -> int:
        """What one token goes through, norms included, but without embedding, head and router: so
        the 45.9 B of M1 are counted."""
        outside = ("embedding", "head", "router")
        return sum(w.num_used_params for w in self.weights() if w.part not in outside)

    @property
    def head_params(self) -> int:
        """Multiplied for each token whose logits are wanted, tied or not."""
        return self.vocab_size * self.hidden_size

    def cache_numbers_per_token(self) -> int:
        """Keys and values (or latents) of one token in all layers together."""
        return sum(layer.attention.cache_numbers_per_token for layer in self.layers)

    def state_numbers(self) -> int:
        """Of one sequence in all layers together, whatever its length."""
        return sum(layer.attention.state_numbers for layer in self.layers)
