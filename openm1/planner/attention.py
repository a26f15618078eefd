"""The kinds of attention: their matrices, what they remember, and what they multiply beside them.

A product is counted where the mathematics asks for it: a causal query meets the keys up to its own,
and what a kernel multiplies only to throw away again is not counted. One multiply-add is 2 FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

Matrix = tuple[str, int, int]
"""Name, rows (outputs), columns (inputs); a vector has one column."""


def causal_pairs(past: int, new: int) -> int:
    """Pairs of a new token with itself or one before it, `past` tokens being there already."""
    return past * new + new * (new + 1) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Lightning:
    """Decaying linear attention with an output gate (M1): one state [D, D] per head, no pages."""

    hidden_size: int
    num_heads: int
    head_dim: int

    kind = "lightning"
    cache_numbers_per_token = 0

    @property
    def size(self) -> int:
        """H D: all heads together."""
        return self.num_heads * self.head_dim

    @property
    def state_numbers(self) -> int:
        return self.size * self.head_dim

    def matrices(self) -> list[Matrix]:
        hidden, size = self.hidden_size, self.size
        return [
            ("qkv_proj", 3 * size, hidden),
            ("output_gate", size, hidden),
            ("out_proj", hidden, size),
            ("norm", size, 1),
        ]

    def step_flops(self, past: int, new: int) -> dict[str, int]:
        """Token by token: S <- decay S + k^T v, o = q S. The past costs nothing."""
        cells = self.state_numbers * new
        return {"state decay": cells, "state update": 2 * cells, "state read": 2 * cells}

    def block_flops(self, past: int, new: int, chunk_tokens: int) -> dict[str, int]:
        """In chunks: products inside each, and one decay of the state for each."""
        num_chunks = -(-new // chunk_tokens)
        full, rest = divmod(new, chunk_tokens)
        pairs = full * causal_pairs(0, chunk_tokens) + causal_pairs(0, rest)
        return {
            "state decay": self.state_numbers * num_chunks,
            "state update": 2 * self.state_numbers * new,
            "state read": 2 * self.state_numbers * new,
            "scores": 2 * self.size * pairs,
            "values": 2 * self.size * pairs,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedQuery:
    """Softmax attention whose query heads share key/value heads (M1's softmax layers, Qwen3)."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    has_qk_norm: bool = False

    kind = "softmax"
    state_numbers = 0

    @property
    def cache_numbers_per_token(self) -> int:
        return 2 * self.num_key_value_heads * self.head_dim

    def matrices(self) -> list[Matrix]:
        hidden, size = self.hidden_size, self.num_heads * self.head_dim
        groups = self.num_key_value_heads * self.head_dim
        norms = [("q_norm", self.head_dim, 1), ("k_norm", self.head_dim, 1)]
        return [
            ("q_proj", size, hidden),
            ("k_proj", groups, hidden),
            ("v_proj", groups, hidden),
            ("o_proj", hidden, size),
            *(norms if self.has_qk_norm else []),
        ]

    def step_flops(self, past: int, new: int) -> dict[str, int]:
        each = 2 * self.num_heads * self.head_dim * causal_pairs(past, new)
        return {"scores": each, "values": each}

    def block_flops(self, past: int, new: int, chunk_tokens: int) -> dict[str, int]:
        return self.step_flops(past, new)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """DeepSeek's multi-head latent attention (MLA).

    Expanded: keys and values of all heads are made from the latent once, and kept. Absorbed: the
    latent is kept, and a decoded token's query is taken into its space and its output out of it: a
    small cache, dear pairs. `kv_b_proj` and its FLOPs per token are the same. Prefill has few pairs
    for each latent and expands in both.
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int
    """0: queries come from one matrix."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    absorbed: bool = False

    kind = "latent"
    state_numbers = 0

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_numbers_per_token(self) -> int:
        if self.absorbed:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_heads * (self.qk_head_dim + self.v_head_dim)

    def matrices(self) -> list[Matrix]:
        hidden, heads, rank = self.hidden_size, self.num_heads, self.q_lora_rank
        query: list[Matrix] = [("q_proj", heads * self.qk_head_dim, hidden)]
        if rank:
            query = [
                ("q_a_proj", rank, hidden),
                ("q_a_norm", rank, 1),
                ("q_b_proj", heads * self.qk_head_dim, rank),
            ]
        return [
            *query,
            ("kv_a_proj", self.kv_lora_rank + self.qk_rope_head_dim, hidden),
            ("kv_a_norm", self.kv_lora_rank, 1),
            ("kv_b_proj", heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank),
            ("o_proj", hidden, heads * self.v_head_dim),
        ]

    def step_flops(self, past: int, new: int) -> dict[str, int]:
        score, value = self.qk_head_dim, self.v_head_dim
        if self.absorbed:
            score, value = self.kv_lora_rank + self.qk_rope_head_dim, self.kv_lora_rank
        pairs = 2 * self.num_heads * causal_pairs(past, new)
        return {"scores": pairs * score, "values": pairs * value}

    def block_flops(self, past: int, new: int, chunk_tokens: int) -> dict[str, int]:
        """Latents of the past, where only they were kept, are expanded once more."""
        pairs = 2 * self.num_heads * causal_pairs(past, new)
        expansion = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank
        return {
            "scores": pairs * self.qk_head_dim,
            "values": pairs * self.v_head_dim,
            "latents again": 2 * expansion * past * int(self.absorbed),
        }


Attention = Lightning | GroupedQuery | Latent
