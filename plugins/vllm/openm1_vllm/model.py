"""M1 on vLLM's layers: the decoder, its experts, the head, and how published names find them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from openm1.model.config import SOFTMAX, M1Config
from openm1_vllm.attention import LightningAttention, SoftmaxAttention
from openm1_vllm.config import m1_config
from openm1_vllm.register import ROPE_OP


class MoE(nn.Module):
    """The router in fp32, the experts as vLLM runs them."""

    def __init__(self, config: M1Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_local_experts,
            bias=False,
            params_dtype=torch.float32,
            prefix=f"{prefix}.gate",
            return_bias=False,
        )
        self.experts = FusedMoEFactory(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=True,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
            ckpt_names=("w1", "w2", "w3"),
            router_logits_dtype=torch.float32,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.gate(x.float()))


class DecoderLayer(nn.Module):
    """Attention and experts with scaled residuals; see OpenM1's layer of the same name."""

    def __init__(self, config: M1Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        layer = int(prefix.rsplit(".", 1)[1])
        full = config.attn_type_list[layer] == SOFTMAX
        kind = "full" if full else "linear"
        self.full, self.postnorm = full, config.postnorm
        self.attention_alpha: float = getattr(config, f"layernorm_{kind}_attention_alpha")
        self.attention_beta: float = getattr(config, f"layernorm_{kind}_attention_beta")
        self.mlp_alpha = config.layernorm_mlp_alpha
        self.mlp_beta = config.layernorm_mlp_beta
        attention = SoftmaxAttention if full else LightningAttention
        self.self_attn = attention(config, vllm_config, f"{prefix}.self_attn")
        self.block_sparse_moe = MoE(config, vllm_config, f"{prefix}.block_sparse_moe")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        x = self.input_layernorm(hidden)
        out = self.self_attn(x, rope) if self.full else self.self_attn(x)
        residual = x if self.postnorm else hidden
        hidden = self.attention_alpha * residual + self.attention_beta * out
        x = self.post_attention_layernorm(hidden)
        residual = x if self.postnorm else hidden
        return self.mlp_alpha * residual + self.mlp_beta * self.block_sparse_moe(x)


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": 0,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class M1Model(nn.Module):
    """From token ids to the last norm, or this pipeline stage's part of it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = m1_config(vllm_config.model_config.hf_config)
        self.rotary_dim, self.rope_theta = config.rotary_dim, config.rope_theta
        stage = get_pp_group()
        self.embed_tokens = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size)
            if stage.is_first_rank
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: DecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps)
            if stage.is_last_rank
            else PPMissingLayer()
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            hidden = intermediate_tensors["hidden_states"]
        else:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rope = getattr(torch.ops.vllm, ROPE_OP)(positions, self.rotary_dim, self.rope_theta)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden = layer(hidden, rope)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden})
        return self.norm(hidden)


class M1ForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsPP):
    hf_to_vllm_mapper = WeightsMapper(
        # Published files of the older release hold constants that the config gives.
        orig_to_new_substr={".self_attn.slope_rate": None, "rotary_emb.inv_freq": None},
        orig_to_new_stacked={f".{name}_proj": (".qkv_proj", name) for name in ("q", "k", "v")},
    )
    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        config = m1_config(hf_config)
        self.num_real_tokens = getattr(hf_config, "num_real_tokens", config.vocab_size)
        self.model = M1Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            if current_platform.is_cpu() and self.lm_head.weight.dtype == torch.bfloat16:
                from openm1_vllm.cpu import WideHead

                self.lm_head.quant_method = WideHead()
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[S, V] in fp32; ids above the tokenizer's have an embedding of 0 and are never drawn."""
        if current_platform.is_cpu():
            # Elsewhere vLLM's own product of bf16 matrices sums into fp32 (`head_dtype`).
            hidden_states = hidden_states.float()
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None:
            logits[:, self.num_real_tokens :] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, int, int]]:
        config = m1_config(vllm_config.model_config.hf_config)
        devices = vllm_config.parallel_config.tensor_parallel_size
        return ((config.num_attention_heads // devices, config.head_dim, config.head_dim),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple:
        return (get_temporal_copy_spec,)
