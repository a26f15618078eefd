"""The fused CPU decode behind the `Runner` seam; prompts go through torch, whose products are fast
when there are many tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from openm1.engine.cache.hybrid import CachedSequence, Order
from openm1.engine.draw import BadLogits, sample_plain
from openm1.engine.runner import TorchRunner
from openm1.kernels.cpu import arguments as kernel
from openm1.kernels.cpu import sample as sampler
from openm1.kernels.cpu.blocks import SPLIT_TOKENS
from openm1.kernels.cpu.compile import is_on_disk
from openm1.kernels.cpu.decode import decode_step
from openm1.kernels.cpu.team import Team
from openm1.kernels.cpu.tiles import tiles_available
from openm1.kernels.cpu.vector import BFLOAT16, FLOAT32, INT8, TILE_DEPTH
from openm1.model.cache import CachePools
from openm1.model.config import SOFTMAX
from openm1.model.int8 import Int8Matrix, is_int8
from openm1.model.lightning_attention import OUTPUT_NORM_EPS, layer_slopes
from openm1.model.m1 import DecoderLayer, M1ForCausalLM

# Logits from which on sampling is worth a second thread.
SHARED_LOGITS = 2**16

FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}


def unsupported(model: M1ForCausalLM) -> str | None:
    """Why the fused decode cannot run this model, or None."""
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"the model's dtype is {model.dtype}; it takes float32 and bfloat16"
    return None


class CpuRunner:
    """fp32 or bf16 weights, read where they lie; fp32 activations, states and logits."""

    def __init__(
        self, model: M1ForCausalLM, pools: CachePools, num_threads: int | None = None
    ) -> None:
        if reason := unsupported(model):
            raise ValueError(f"the fused CPU decode cannot run here: {reason}")
        self.model, self.pools = model, pools
        self._torch = TorchRunner(model, pools)
        self._team = Team(num_threads or torch.get_num_threads())
        self._alone = Team(1)
        self._page_tables: WeakKeyDictionary[CachedSequence, np.ndarray] = WeakKeyDictionary()
        self._rows = self._parts = 0
        self._arguments: np.ndarray | None = None
        if not is_on_disk(decode_step):
            print(
                "openm1: compiling the CPU kernels; this takes half a minute, once", file=sys.stderr
            )
        self.weights_changed()

    def apply(self, orders: Sequence[Order]) -> None:
        self._torch.apply(orders)

    def prefill(self, pieces: list[tuple[CachedSequence, list[int]]]) -> None:
        self._torch.prefill(pieces)

    def weights_changed(self) -> None:
        self._head = _head_weight(self.model)
        self._shape, self._formats = _shape(self.model), _formats(self.model, self._head)
        self._table = _layer_table(self.model, self._head)
        self._cache = _cache_addresses(self.pools)
        self._arguments = None

    def decode(self, token_ids: list[int], sequences: list[CachedSequence]) -> Tensor:
        """The logits are overwritten by the next call."""
        batch = self._batch(token_ids, sequences)
        self._make_room(len(token_ids), int(batch.first_part[-1]))
        assert self._arguments is not None
        self._arguments[kernel.BATCH : kernel.SPACE] = kernel.flatten(batch)
        self._team.run(decode_step, self._arguments)
        return torch.from_numpy(self._logits[: len(token_ids)])

    def sample(
        self, logits: Tensor, temperature: Tensor, draws: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `draw.sample_plain`, in fp32."""
        count, size = logits.shape
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            return sample_plain(logits, temperature, draws, given)
        blocks = -(-size // sampler.BLOCK)
        tokens, logprobs = np.zeros(count, np.int64), np.zeros(count, np.float64)
        # Few logits are done before a second thread has woken up.
        team = self._team if count * size > SHARED_LOGITS else self._alone
        team.run(
            sampler.sample_step,
            logits.data_ptr(),
            4 * logits.stride(0),
            size,
            temperature.numpy(),
            draws.numpy(),
            given.numpy(),
            np.zeros((count, blocks), np.float32),
            np.zeros((count, blocks), np.float64),
            tokens,
            logprobs,
        )
        if bad := np.isnan(logprobs).nonzero()[0].tolist():
            raise BadLogits(bad)
        return torch.from_numpy(tokens), torch.from_numpy(logprobs)

    def _batch(self, token_ids: list[int], sequences: list[CachedSequence]) -> kernel.Batch:
        positions = np.array([s.num_tokens for s in sequences], np.int64)
        splits = -(-(positions + 1) // SPLIT_TOKENS)
        first_part = np.zeros(len(sequences) + 1, np.int64)
        if self.model.config.softmax_layers:
            np.cumsum(splits * self.model.config.num_key_value_heads, out=first_part[1:])
        return kernel.Batch(
            tokens=np.array(token_ids, np.int64),
            positions=positions,
            slots=np.array([s.slot or 0 for s in sequences], np.int64),
            pages=np.array([self._page_table(s).ctypes.data for s in sequences], np.int64),
            first_part=first_part,
        )

    def _page_table(self, sequence: CachedSequence) -> np.ndarray:
        """The sequence's page ids; a million tokens have too many to convert for each token."""
        table = self._page_tables.get(sequence)
        count = len(sequence.pages)
        if table is None or table[0] > count or count >= len(table):
            table = np.zeros(2 * count + 2, np.int64)
            self._page_tables[sequence] = table
        known = int(table[0])
        if count > known:
            table[1 + known : 1 + count] = sequence.pages[known:]
            table[0] = count
        return table[1:]

    def _make_room(self, rows: int, parts: int) -> None:
        if rows <= self._rows and parts <= self._parts and self._arguments is not None:
            return
        self._rows = max(rows, min(2 * self._rows, rows + 64))
        self._parts = max(parts, min(2 * self._parts, parts + 4096))
        self._space = kernel.make_workspace(
            self._shape,
            self._formats,
            len(self._table.frequencies),
            rows=self._rows,
            parts=self._parts,
            threads=self._team.num_threads,
        )
        self._logits = np.zeros((self._rows + 4, self._shape.vocab_size), np.float32)
        nothing = kernel.Batch(*[np.zeros(0, np.int64)] * 5)
        self._arguments = kernel.flatten(
            self._shape,
            self._formats,
            self._table,
            self._cache,
            nothing,
            self._space,
            self._logits,
        )


def _head_weight(model: M1ForCausalLM) -> Tensor:
    """A bf16 model's fp32 head in bf16 where nothing is lost by it: half the memory to read."""
    weight = model.head_weight.detach()
    if model.dtype == torch.bfloat16 and weight.dtype == torch.float32:
        short = weight.to(torch.bfloat16)
        # Row by row, not to double the memory of a large head.
        if all(
            torch.equal(a, b.float())
            for a, b in zip(weight.split(4096), short.split(4096), strict=True)
        ):
            return short
    return weight


def _shape(model: M1ForCausalLM) -> kernel.Shape:
    config = model.config
    return kernel.Shape(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        expert_width=config.intermediate_size,
        vocab_size=config.vocab_size,
        eps=config.rms_norm_eps,
        output_norm_eps=OUTPUT_NORM_EPS,
        postnorm=config.postnorm,
    )


def _formats(model: M1ForCausalLM, head: Tensor) -> kernel.Formats:
    config = model.config
    stored = FORMATS[model.dtype]
    linear = INT8 if is_int8(model) else stored
    widths = (config.hidden_size, config.attention_size, config.intermediate_size)
    whole = all(width % TILE_DEPTH == 0 for width in widths)
    return kernel.Formats(
        linear=linear,
        norm=stored,
        embedding=stored,
        head=FORMATS[head.dtype],
        cache=stored,
        tiles=linear == BFLOAT16 and whole and tiles_available(),
    )


def _layer_table(model: M1ForCausalLM, head: Tensor) -> kernel.LayerTable:
    config = model.config
    layers: list[DecoderLayer] = list(model.model.layers)  # pyright: ignore[reportAssignmentType]
    ordinals = {
        n: i
        for kind in (config.softmax_layers, config.lightning_layers)
        for i, n in enumerate(kind)
    }
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float64)
    return kernel.LayerTable(
        full=np.array([kind == SOFTMAX for kind in config.attn_type_list], np.int64),
        ordinal=np.array([ordinals[i] for i in range(len(layers))], np.int64),
        addresses=np.array([_addresses(layer) for layer in layers], np.int64),
        scales=np.array([_scale_addresses(layer) for layer in layers], np.int64),
        residual=np.array(
            [[x.attention_alpha, x.attention_beta, x.mlp_alpha, x.mlp_beta] for x in layers],
            np.float32,
        ),
        decay=np.array(
            [[math.exp(-s) for s in layer_slopes(config, i).tolist()] for i in range(len(layers))],
            np.float32,
        ),
        frequencies=config.rope_theta ** (-exponent / config.rotary_dim),
        final_norm=model.model.norm.weight.data_ptr(),
        embedding=model.model.embed_tokens.weight.data_ptr(),
        head=head.data_ptr(),
    )


def _weights(layer: DecoderLayer) -> list[nn.Module | Tensor | None]:
    """In the order of the kernel's columns."""
    attention, moe = layer.self_attn, layer.block_sparse_moe
    names = ("qkv_proj", "output_gate", "norm", "out_proj")
    if not hasattr(attention, "qkv_proj"):
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [
        layer.input_layernorm,
        *(getattr(attention, name) for name in names),
        layer.post_attention_layernorm,
        getattr(moe, "gate", None),
        moe.experts.w1,
        moe.experts.w3,
        moe.experts.w2,
    ]


def _addresses(layer: DecoderLayer) -> list[int]:
    addresses = []
    for weight in _weights(layer):
        if isinstance(weight, Int8Matrix):
            weight = weight.rows
        elif isinstance(weight, nn.Module):
            weight = weight.weight
        assert weight is None or isinstance(weight, Tensor)
        assert weight is None or weight.is_contiguous(), "weights are read row by row"
        addresses.append(0 if weight is None else weight.data_ptr())
    return addresses


def _scale_addresses(layer: DecoderLayer) -> list[int]:
    return [
        weight.scales.data_ptr() if isinstance(weight, Int8Matrix) else 0
        for weight in _weights(layer)
    ]


def _cache_addresses(pools: CachePools) -> kernel.Cache:
    return kernel.Cache(
        keys=pools.keys.data_ptr(),
        values=pools.values.data_ptr(),
        layer_bytes=pools.keys[0].nbytes if len(pools.keys) else 0,
        page_tokens=pools.page_tokens,
        states=pools.states.data_ptr(),
        slot_bytes=pools.states[0].nbytes if len(pools.states) else 0,
    )
