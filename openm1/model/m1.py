"""The whole model, one class for training and generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openm1.kernels.packing import PackedLayout
from openm1.model.cache import CacheView
from openm1.model.config import SOFTMAX, M1Config
from openm1.model.layers import Linear, RMSNorm, linear_fp32
from openm1.model.lightning_attention import LightningAttention
from openm1.model.moe import MoE
from openm1.model.rope import rope_tables
from openm1.model.softmax_attention import SoftmaxAttention


@dataclass(frozen=True)
class M1Output:
    hidden: Float[Tensor, "T C"]
    """After the final norm, in the model's dtype."""
    aux_loss: Tensor
    """Mean over layers of the experts' balance loss, before its coefficient. It is for training:
    0 where gradients are off."""


class DecoderLayer(nn.Module):
    """Attention and experts, each with a scaled residual.

    Post-norm: x = RMS(h); h' = alpha x + beta f(x), the residual is the normalised stream.
    Pre-norm: h' = alpha h + beta f(RMS(h)).
    """

    def __init__(self, config: M1Config, layer: int) -> None:
        super().__init__()
        self.postnorm = config.postnorm
        full = config.attn_type_list[layer] == SOFTMAX
        self.self_attn: nn.Module = (SoftmaxAttention if full else LightningAttention)(
            config, layer
        )
        self.block_sparse_moe = MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = "full" if full else "linear"
        self.attention_alpha: float = getattr(config, f"layernorm_{kind}_attention_alpha")
        self.attention_beta: float = getattr(config, f"layernorm_{kind}_attention_beta")
        self.mlp_alpha = config.layernorm_mlp_alpha
        self.mlp_beta = config.layernorm_mlp_beta

    def forward(
        self,
        hidden: Tensor,
        layout: PackedLayout,
        rope: tuple[Tensor, Tensor],
        cache: CacheView | None,
        experts: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        x = self.input_layernorm(hidden)
        if isinstance(self.self_attn, SoftmaxAttention):
            out = self.self_attn(x, layout, rope, cache)
        else:
            out = self.self_attn(x, layout, cache)
        residual = x if self.postnorm else hidden
        hidden = _mix(residual, self.attention_alpha, out, self.attention_beta)
        x = self.post_attention_layernorm(hidden)
        out, aux_loss = self.block_sparse_moe(x, experts, seen)
        residual = x if self.postnorm else hidden
        return _mix(residual, self.mlp_alpha, out, self.mlp_beta), aux_loss


def _mix(residual: Tensor, alpha: float, out: Tensor, beta: float) -> Tensor:
    scaled = out if beta == 1.0 else out * beta
    return torch.add(scaled, residual, alpha=alpha)


class M1Model(nn.Module):
    """Everything between token ids and the head."""

    def __init__(self, config: M1Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.empty(config.vocab_size, config.hidden_size),
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Int[Tensor, " T"],
        layout: PackedLayout,
        cache: CacheView | None = None,
        *,
        experts: Int[Tensor, "T L K"] | None = None,
        seen: list[Tensor] | None = None,
    ) -> M1Output:
        """`experts` are those that tokens go to in each layer, -1 where the router chooses; to
        `seen`, each layer's choices [T, K] are added."""
        positions = layout.positions if cache is None else cache.positions
        rope = rope_tables(positions, self.config.rotary_dim, self.config.rope_theta)
        hidden = self.embed_tokens(input_ids)
        losses = []
        for number, layer in enumerate(self.layers):
            given = None if experts is None else experts[:, number]
            hidden, loss = layer(hidden, layout, rope, cache, given, seen)
            losses.append(loss)
        return M1Output(self.norm(hidden), torch.stack(losses).mean())


class M1ForCausalLM(nn.Module):
    """A hybrid-attention mixture of experts with a language-model head.

    Parameter names are the published checkpoint's, with the experts of a layer stacked. The head's
    weight and arithmetic are fp32 whatever `dtype` is. On the "meta" device nothing is allocated.
    """

    def __init__(
        self,
        config: M1Config,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        with _default_dtype(dtype), torch.device(device):
            self.model = M1Model(config)
        if not config.tie_word_embeddings:
            head_dtype = torch.promote_types(dtype, torch.float32)
            with _default_dtype(head_dtype), torch.device(device):
                self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if torch.device(device).type != "meta":
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Every matrix normal with std `initializer_range`, every norm 1; the same for a seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits in fp32. Every row is a sequence; there is no padding token."""
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids has shape {[*input_ids.shape]}; allowed is [B, T], both at least 1"
            )
        batch, length = input_ids.shape
        layout = PackedLayout([length] * batch, input_ids.device)
        hidden = self.model(self.check_ids(input_ids.flatten()), layout).hidden
        return self.logits(hidden).unflatten(0, (batch, length))

    def logits(self, hidden: Float[Tensor, "T C"]) -> Float[Tensor, "T V"]:
        """The head, in fp32."""
        return linear_fp32(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """[V, C]."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def check_ids(self, input_ids: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
        """Returns `input_ids`; raises ValueError if one is outside the vocabulary."""
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside 0..{self.config.vocab_size - 1}"
            )
        return input_ids

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        device: torch.device | str = "cpu",
    ) -> M1ForCausalLM:
        """Loads a folder (published, transformers or Llama layout), a .gguf file, or "nano".

        Raises CheckpointMismatch naming every missing, unexpected or misshapen tensor.
        """
        from openm1.model.hf import load_pretrained

        return load_pretrained(cls, path_or_name, dtype=dtype, device=device)

    def save_pretrained(self, path: str | Path, layout: str = "published") -> None:
        """Writes config.json and safetensors; layout is "published" or "transformers"."""
        from openm1.model.hf import save_pretrained

        save_pretrained(self, path, layout=layout)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
