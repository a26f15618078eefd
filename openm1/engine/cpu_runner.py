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
from openm1.kernels.cpu.decode import decode_step
from openm1.kernels.cpu.team import Team
from openm1.kernels.cpu.tiles import tiles_available
from openm1.kernels.cpu.vector import BFLOAT16, FLOAT32, INT8, TILE_DEPTH
from openm1.model.cache import CachePools
from openm1.model.config import SOFTMAX
from openm1.model.int8 import Int8Matrix, is_int8
from openm1.model.lightning_attention import OUTPUT_NORM_EPS, layer_slopes
from openm1.model.m1 import DecoderLayer, M1ForCausalLM

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
        self._page_tables: WeakKeyDictionary[CachedSequence, tuple[np.ndarray, int]]
        self._page_tables = WeakKeyDictionary()
        self._rows = self._parts = 0
        self._make_sampling_room(1, self.model.config.vocab_size)
        if not decode_step.is_on_disk:
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
        self._rows = self._parts = 0

    def decode(self, token_ids: list[int], sequences: list[CachedSequence]) -> Tensor:
        """The logits are overwritten by the next call."""
        positions = np.array([s.num_tokens for s in sequences], np.int64)
        first_part = self._first_part(positions)
        self._make_room(len(token_ids), int(first_part[-1]))
        self._fill_batch(token_ids, sequences, positions, first_part)
        self._team.run(decode_step, self._arguments)
        return torch.from_numpy(self._logits[: len(token_ids)])

    def sample(
        self, logits: Tensor, temperature: Tensor, draws: Tensor, given: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `draw.sample_plain`, in fp32."""
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            return sample_plain(logits, temperature, draws, given)
        count, size = logits.shape
        if count > len(self._sampling.temperature) or size > self._sampling.size:
            self._make_sampling_room(count, size)
        room = self._sampling
        for column, values in (
            (room.temperature, temperature),
            (room.draws, draws),
            (room.given, given),
        ):
            column[:count] = values.numpy()
        header = count, logits.data_ptr(), 4 * logits.stride(0), size
        self._sampling_arguments[: len(header), 0] = header
        self._team.run(sampler.sample_step, self._sampling_arguments)
        logprobs = room.logprobs[:count].copy()
        if np.isnan(logprobs).any():
            raise BadLogits(np.isnan(logprobs).nonzero()[0].tolist())
        return torch.from_numpy(room.tokens[:count].copy()), torch.from_numpy(logprobs)

    def _make_sampling_room(self, rows: int, size: int) -> None:
        rows, blocks = 2 * rows, -(-size // sampler.BLOCK)
        self._sampling = sampler.SampleArguments(
            num_rows=0,
            logits=0,
            row_bytes=0,
            size=size,
            temperature=np.zeros(rows),
            draws=np.zeros(rows),
            given=np.zeros(rows, np.int64),
            tops=np.zeros((rows, blocks), np.float32),
            sums=np.zeros((rows, blocks)),
            tokens=np.zeros(rows, np.int64),
            logprobs=np.zeros(rows),
        )
        self._sampling_arguments = kernel.flatten(self._sampling)

    def _first_part(self, positions: np.ndarray) -> np.ndarray:
        """How many attention parts the rows before have, [S + 1]."""
        first_part = np.zeros(len(positions) + 1, np.int64)
        if self.model.config.softmax_layers:
            splits = positions // SPLIT_TOKENS + 1
            np.cumsum(splits * self.model.config.num_key_value_heads, out=first_part[1:])
        return first_part

    def _fill_batch(
        self,
        token_ids: list[int],
        sequences: list[CachedSequence],
        positions: np.ndarray,
        first_part: np.ndarray,
    ) -> None:
        count, batch = len(token_ids), self._batch
        batch.tokens[:count] = token_ids
        batch.positions[:count] = positions
        batch.slots[:count] = [s.slot or 0 for s in sequences]
        batch.pages[:count] = [self._page_table(s)[1] for s in sequences]
        batch.first_part[: count + 1] = first_part
        self._arguments[kernel.BATCH : kernel.SPACE, 1] = [count, count, count, count, count + 1]

    def _page_table(self, sequence: CachedSequence) -> tuple[np.ndarray, int]:
        """The sequence's page ids, behind a count of those that are filled in, and the address of
        the first: a million tokens have too many to convert for each token."""
        known = self._page_tables.get(sequence)
        count = len(sequence.pages)
        if known is None or known[0][0] > count or count >= len(known[0]):
            table = np.zeros(2 * count + 2, np.int64)
            known = self._page_tables[sequence] = table, table[1:].ctypes.data
        filled = int(known[0][0])
        if count > filled:
            known[0][1 + filled : 1 + count] = sequence.pages[filled:]
            known[0][0] = count
        return known

    def _make_room(self, rows: int, parts: int) -> None:
        if rows <= self._rows and parts <= self._parts:
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
        self._batch = kernel.Batch(*[np.zeros(self._rows + 1, np.int64) for _ in range(5)])
        self._arguments = kernel.flatten(
            self._shape,
            self._formats,
            self._table,
            self._cache,
            self._batch,
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
