"""M1's two kinds of attention layers on vLLM, and how the lightning state lives between steps.

vLLM keeps the state in pages of its hybrid cache, one page a sequence. Before each step it calls
the metadata builder below, which says where each sequence's state is and which rows are decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.checkpoint import (
    MambaPrefillCheckpointBuilder,
    MambaPrefillCheckpointMetadata,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import (
    PAD_SLOT_ID,
    split_decodes_and_prefills,
)
from vllm.v1.kv_cache_interface import MambaSpec

from openm1.kernels.packing import PackedLayout
from openm1.model.config import M1Config
from openm1.model.lightning_attention import OUTPUT_NORM_EPS, layer_slopes
from openm1.model.rope import apply_rope, rope_tables
from openm1_vllm.kernels import lightning_decode, lightning_prefill
from openm1_vllm.register import LIGHTNING_OP, ROPE_OP

NARROWEST_HEAD = 32


@dataclass(frozen=True)
class Part:
    """Tokens that a prefill takes in one go."""

    rows: slice | torch.Tensor
    """Which of the step's tokens, in the order of `layout`."""
    layout: PackedLayout


@dataclass(frozen=True)
class LightningMetadata:
    """One step's batch: first the rows that continue by one token, then all others.

    All groups of layers share it but for `pages` and `kept_pages`.
    """

    num_decodes: int
    columns: torch.Tensor | None
    """[S, 1] int64: where in a group's block table each sequence's page is; None: in the first."""
    padding: torch.Tensor | None
    """[S] bool: rows without a sequence, in a batch of decodes only; None where there are none."""
    pages: torch.Tensor
    """[S] int32: the page of each sequence's state; PAD_SLOT_ID for padding."""
    first: Part | None = None
    """Of the N sequences behind the decodes; None where there are none. Up to where the prefix
    cache keeps a state, where it keeps one in the middle of this step."""
    has_state: torch.Tensor | None = None
    """[N, 1, 1, 1] bool: 0 where a sequence starts: its page holds another's state."""
    second: Part | None = None
    """What the M sequences of which such a state is kept have behind it."""
    kept: torch.Tensor | None = None
    """[M] int64: which of the N they are."""
    checkpoint: MambaPrefillCheckpointMetadata | None = None
    kept_pages: torch.Tensor | None = None
    """[M]: where that state goes."""


class LightningMetadataBuilder(AttentionMetadataBuilder[LightningMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1
    supports_update_block_table = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config: VllmConfig, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # CUDA graphs of decode steps read the pages from here.
        graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._has_graphs = graph > 0
        limit = max(vllm_config.scheduler_config.max_num_seqs, graph)
        self._pages = torch.full((limit,), PAD_SLOT_ID, dtype=torch.int32, device=device)
        self._checkpoints = MambaPrefillCheckpointBuilder(vllm_config, kv_cache_spec)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata):
        nothing = torch.zeros(common_attn_metadata.num_reqs, dtype=torch.bool)
        return self.build(0, common_attn_metadata.replace(is_prefilling=nothing))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LightningMetadata:
        batch = common_attn_metadata
        # A prompt of one token is no decode: the page it was given holds another's state.
        num_decodes, *_ = split_decodes_and_prefills(
            batch, decode_threshold=1, treat_short_extends_as_decodes=False
        )
        # Rows without tokens, at the end, are padding.
        bounds = batch.query_start_loc_cpu[num_decodes:].tolist()
        lengths = [b - a for a, b in pairwise(bounds) if b > a]
        columns = self._columns(batch.seq_lens)
        if not lengths:
            full = int(batch.query_start_loc_cpu[-1]) == batch.num_reqs
            plain = full and not self._has_graphs
            padding = None if plain else torch.diff(batch.query_start_loc) == 0
            pages = self._place(batch.block_table_tensor, columns, padding)
            return LightningMetadata(num_decodes, columns, padding, pages)
        others = slice(num_decodes, num_decodes + len(lengths))
        past = (batch.seq_lens - torch.diff(batch.query_start_loc))[others]
        checkpoint = self._checkpoints.build(batch, list(range(others.start, others.stop)))
        first, second, kept = _parts(
            lengths, checkpoint.offsets if checkpoint else None, bounds[0], self.device
        )
        columns = columns[: others.stop] if columns is not None else None
        made = LightningMetadata(
            num_decodes=num_decodes,
            columns=columns,
            padding=None,
            pages=self._place(batch.block_table_tensor[: others.stop], columns, None),
            first=first,
            has_state=(past > 0)[:, None, None, None],
            second=second,
            kept=kept,
            checkpoint=checkpoint,
        )
        return _with_kept_pages(made)

    def update_block_table(
        self, metadata: LightningMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> LightningMetadata:
        """The same step for another group of layers, whose states lie in other pages."""
        table = blk_table[: len(metadata.pages)]
        pages = self._place(table, metadata.columns, metadata.padding)
        if metadata.checkpoint is None:
            return replace(metadata, pages=pages)
        checkpoint = metadata.checkpoint.regather_state_indices(blk_table)
        return _with_kept_pages(replace(metadata, pages=pages, checkpoint=checkpoint))

    def _columns(self, seq_lens: torch.Tensor) -> torch.Tensor | None:
        """With prefix caching a table has a column for each block of tokens, else one for all."""
        if self.vllm_config.cache_config.mamba_cache_mode == "none":
            return None
        return ((seq_lens - 1) // self.kv_cache_spec.block_size).clamp(min=0).long()[:, None]

    def _place(
        self, table: torch.Tensor, columns: torch.Tensor | None, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """The pages; with padding, in a buffer that never moves."""
        pages = (table if columns is None else table.gather(1, columns))[:, 0]
        if padding is None:
            return pages.contiguous()
        self._pages[: len(pages)] = pages.masked_fill(padding, PAD_SLOT_ID)
        return self._pages[: len(pages)]


def _parts(
    lengths: list[int], offsets: list[int] | None, start: int, device: torch.device
) -> tuple[Part, Part | None, torch.Tensor | None]:
    """Sequences whose tokens begin at `start`, cut where their offset is not 0; which are cut."""
    if offsets is None:
        whole = slice(start, start + sum(lengths))
        return Part(whole, PackedLayout(lengths, device)), None, None
    cuts, heads, tails = [], [], []
    for length, offset in zip(lengths, offsets, strict=True):
        cuts.append(offset or length)
        heads.append(range(start, start + cuts[-1]))
        tails.append(range(start + cuts[-1], start + length))
        start += length
    kept = [i for i, offset in enumerate(offsets) if offset]
    rests = [lengths[i] - cuts[i] for i in kept]
    return (
        Part(_rows(heads, device), PackedLayout(cuts, device)),
        Part(_rows([tails[i] for i in kept], device), PackedLayout(rests, device)),
        torch.tensor(kept, device=device),
    )


def _rows(ranges: list[range], device: torch.device) -> slice | torch.Tensor:
    if len(ranges) == 1:
        return slice(ranges[0].start, ranges[0].stop)
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges]).to(device)


def _with_kept_pages(made: LightningMetadata) -> LightningMetadata:
    if made.checkpoint is None:
        return made
    return replace(made, kept_pages=made.checkpoint.state_indices[made.kept].long())


class LightningBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "OPENM1_LIGHTNING"

    @staticmethod
    def get_builder_cls() -> type[LightningMetadataBuilder]:
        return LightningMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class ParallelRMSNorm(nn.Module):
    """Over all heads, of which each device has its share; fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.devices = get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.ones(size // self.devices))
        self.weight.weight_loader = self._load

    @staticmethod
    def _load(parameter: nn.Parameter, whole: torch.Tensor) -> None:
        rank = get_tensor_model_parallel_rank()
        parameter.data.copy_(whole.narrow(0, rank * len(parameter), len(parameter)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.devices > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        scale = torch.rsqrt(squares / self.size + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


class LightningAttention(nn.Module, MambaBase):
    """out = W_o (sigmoid(W_g x) * RMS(o)); q, k, v = silu(W_qkv x), packed per head."""

    def __init__(self, config: M1Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix, self.head_dim = prefix, config.head_dim
        devices, rank = (
            get_tensor_model_parallel_world_size(),
            get_tensor_model_parallel_rank(),
        )
        if config.num_attention_heads % devices:
            raise ValueError(
                f"tensor_parallel_size is {devices}; it must divide num_attention_heads, "
                f"{config.num_attention_heads}"
            )
        self.num_heads = config.num_attention_heads // devices
        size, quant = config.attention_size, vllm_config.quant_config

        def linear(kind, inputs, outputs, name):
            return kind(
                inputs,
                outputs,
                bias=False,
                quant_config=quant,
                prefix=f"{prefix}.{name}",
                return_bias=False,
            )

        self.qkv_proj = linear(ColumnParallelLinear, config.hidden_size, 3 * size, "qkv_proj")
        self.output_gate = linear(ColumnParallelLinear, config.hidden_size, size, "output_gate")
        self.out_proj = linear(RowParallelLinear, size, config.hidden_size, "out_proj")
        self.norm = ParallelRMSNorm(size, OUTPUT_NORM_EPS)
        slopes = layer_slopes(config, extract_layer_index(prefix)).to(self.norm.weight.device)
        self.slopes = slopes[rank * self.num_heads : (rank + 1) * self.num_heads].contiguous()
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        qkv = F.silu(self.qkv_proj(x))
        out = qkv.new_zeros(len(qkv), self.num_heads * self.head_dim)
        getattr(torch.ops.vllm, LIGHTNING_OP)(qkv, out, self.prefix)
        return self.out_proj(torch.sigmoid(self.output_gate(x)) * self.norm(out))

    def attend(self, qkv: torch.Tensor, out: torch.Tensor, batch: LightningMetadata) -> None:
        """Fills the rows of `out` that belong to sequences, and moves their states on."""
        states, count = self.kv_cache[0], batch.num_decodes
        if count:
            lightning_decode(qkv, self.slopes, states, batch.pages, count, out)
        if batch.first is None:
            return
        rows = qkv.unflatten(-1, (self.num_heads, 3 * self.head_dim))
        result = out.unflatten(-1, (self.num_heads, self.head_dim))
        pages = batch.pages[count:].long()
        before = states[pages].masked_fill(~batch.has_state, 0.0)
        after = self._prefill(rows, batch.first, before, result)
        if batch.second is not None:
            kept = after[batch.kept]
            states[batch.kept_pages] = kept
            after[batch.kept] = self._prefill(rows, batch.second, kept, result)
        states[pages] = after

    def _prefill(
        self, rows: torch.Tensor, part: Part, before: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """The states after each sequence of `part`; fills its rows of `result`."""
        q, k, v = rows[part.rows].chunk(3, -1)
        result[part.rows], after = lightning_prefill(q, k, v, self.slopes, part.layout, before)
        return after

    def rehearse(self, qkv: torch.Tensor) -> None:
        """Takes the memory, and compiles the kernels, of a prefill of all rows of `qkv`."""
        q, k, v = qkv.unflatten(-1, (self.num_heads, 3 * self.head_dim)).chunk(3, -1)
        state = self.slopes.new_zeros(1, *self.get_state_shape()[0])
        lightning_prefill(q, k, v, self.slopes, PackedLayout([len(qkv)], qkv.device), state)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LightningBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        """A prefill can keep the state at any of its tokens for the prefix cache, in one step."""
        spec = super().get_kv_cache_spec(vllm_config)
        return replace(spec, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1)

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        return ((self.num_heads, self.head_dim, self.head_dim),)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        return (torch.float32,)


@eager_break_during_capture
def _lightning(qkv: torch.Tensor, out: torch.Tensor, layer_name: str) -> None:
    """Opaque to torch.compile: what it reads and writes besides `out` lies in the cache."""
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    if context.attn_metadata is None:  # vLLM measures memory, before there is a cache.
        layer.rehearse(qkv)
    else:
        layer.attend(qkv, out, context.attn_metadata[layer_name])


direct_register_custom_op(op_name=LIGHTNING_OP, op_func=_lightning, mutates_args=["out"])


def _rope_tables(
    positions: torch.Tensor, rotary_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Opaque to torch.compile, which would else compute the fp64 angles anew in every head."""
    return rope_tables(positions, rotary_dim, theta)


def _rope_shapes(
    positions: torch.Tensor, rotary_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = positions.shape[0], rotary_dim // 2
    return tuple(positions.new_empty(shape, dtype=torch.float32) for _ in range(2))


direct_register_custom_op(op_name=ROPE_OP, op_func=_rope_tables, fake_impl=_rope_shapes)


class SoftmaxAttention(nn.Module):
    """vLLM's attention; the rotary is M1's: partial, its angles exact at a million tokens."""

    def __init__(self, config: M1Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.head_dim, quant = config.head_dim, vllm_config.quant_config
        devices = get_tensor_model_parallel_world_size()
        num_heads = config.num_attention_heads // devices
        num_kv_heads = max(1, config.num_key_value_heads // devices)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.o_proj = RowParallelLinear(
            config.attention_size,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        # vLLM's attention on a CPU has no narrower heads; zeros change neither scores nor sums.
        self.width = max(config.head_dim, NARROWEST_HEAD)
        self.attn = Attention(
            num_heads,
            self.width,
            config.head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )
        self.sizes = [n * config.head_dim for n in (num_heads, num_kv_heads, num_kv_heads)]

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        rows = self.qkv_proj(x).split(self.sizes, -1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in rows)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if self.width == self.head_dim:
            return self.o_proj(self.attn(*(y.flatten(1) for y in (q, k, v))))
        padding = (0, self.width - self.head_dim)
        out = self.attn(*(F.pad(y, padding).flatten(1) for y in (q, k, v)))
        return self.o_proj(out.unflatten(-1, (-1, self.width))[..., : self.head_dim].flatten(1))
