"""M1's two kinds of attention layers on vLLM, and how the lightning state lives between steps.

vLLM keeps the state in pages of its hybrid cache, one page a sequence. Before each step it calls
the metadata builder below, which says where each sequence's state is and which rows are decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    mamba_get_block_table_tensor,
    split_decodes_and_prefills,
)

from openm1.kernels.packing import PackedLayout
from openm1.model.config import M1Config
from openm1.model.lightning_attention import OUTPUT_NORM_EPS, layer_slopes
from openm1.model.rope import apply_rope
from openm1_vllm.kernels import lightning_decode, lightning_prefill
from openm1_vllm.register import LIGHTNING_OP

NARROWEST_HEAD = 32


@dataclass
class LightningMetadata:
    """One step's batch: first the rows that continue by one token, then all others."""

    num_decodes: int
    pages: torch.Tensor
    """[S] int32: the page of each sequence's state; PAD_SLOT_ID for padding."""
    layout: PackedLayout | None
    """Of the sequences behind the decodes; None where there are none."""
    has_state: torch.Tensor | None
    """[N, 1, 1, 1] bool: 0 where a sequence of `layout` starts: its page holds another's state."""


class LightningMetadataBuilder(AttentionMetadataBuilder[LightningMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1

    def __init__(self, kv_cache_spec, layer_names, vllm_config: VllmConfig, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # CUDA graphs of decode steps read the pages from here.
        graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        limit = max(vllm_config.scheduler_config.max_num_seqs, graph)
        self._pages = torch.full((limit,), PAD_SLOT_ID, dtype=torch.int32, device=device)

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
        pages = mamba_get_block_table_tensor(
            batch.block_table_tensor,
            batch.seq_lens,
            self.kv_cache_spec,
            self.vllm_config.cache_config.mamba_cache_mode,
        )[:, 0]
        # Rows without tokens, at the end, are padding.
        lengths = [n for n in torch.diff(batch.query_start_loc_cpu[num_decodes:]).tolist() if n]
        if not lengths:
            return LightningMetadata(num_decodes, self._graph_pages(pages, batch), None, None)
        others = slice(num_decodes, num_decodes + len(lengths))
        past = (batch.seq_lens - torch.diff(batch.query_start_loc))[others]
        return LightningMetadata(
            num_decodes=num_decodes,
            pages=pages[: others.stop],
            layout=PackedLayout(lengths, pages.device),
            has_state=(past > 0)[:, None, None, None],
        )

    def _graph_pages(self, pages: torch.Tensor, batch: CommonAttentionMetadata) -> torch.Tensor:
        """A view of a buffer that never moves; rows of padding have no tokens."""
        count = len(pages)
        padding = torch.diff(batch.query_start_loc[: count + 1]) == 0
        self._pages[:count] = pages.masked_fill(padding, PAD_SLOT_ID)
        return self._pages[:count]


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
        states = self.kv_cache[0]
        rows = qkv.unflatten(-1, (self.num_heads, 3 * self.head_dim))
        result = out.unflatten(-1, (self.num_heads, self.head_dim))
        count = batch.num_decodes
        if count:
            q, k, v = rows[:count].chunk(3, -1)
            lightning_decode(q, k, v, self.slopes, states, batch.pages[:count], result[:count])
        if batch.layout is not None:
            end = count + batch.layout.num_tokens
            q, k, v = rows[count:end].chunk(3, -1)
            pages = batch.pages[count:].long()
            before = states[pages].masked_fill(~batch.has_state, 0.0)
            result[count:end], states[pages] = lightning_prefill(
                q, k, v, self.slopes, batch.layout, before
            )

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
