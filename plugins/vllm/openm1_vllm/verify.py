"""What is checked and set when vLLM makes its configuration, before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.tokenizers import cached_tokenizer_from_config

from openm1_vllm.config import m1_config

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

TOKENIZER_MODE = "minimax_m1"


class M1EngineConfig(VerifyAndUpdateConfig):
    """vLLM calls these by the architecture's name."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """fp32 logits, the tokenizer with the right template, which ids exist, which one ends."""
        hf_config = model_config.hf_config
        m1_config(hf_config)
        hf_config.head_dtype = "float32"
        if model_config.skip_tokenizer_init:
            return
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE
        tokenizer = cached_tokenizer_from_config(model_config)
        if tokenizer.max_token_id >= hf_config.vocab_size:
            raise ValueError(
                f"the tokenizer has the id {tokenizer.max_token_id}, the model's vocab_size is "
                f"{hf_config.vocab_size}"
            )
        hf_config.eos_token_id = tokenizer.eos_token_id
        hf_config.num_real_tokens = tokenizer.max_token_id + 1

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises ValueError on what would give wrong tokens."""
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative decoding is on; a rejected draft would stay in the state of M1's "
                "lightning layers, so this plugin serves without it"
            )
        cache = vllm_config.cache_config
        for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
            if (dtype := getattr(cache, name)) not in ("auto", "float32"):
                raise ValueError(
                    f"{name} is {dtype!r}; allowed are 'auto' and 'float32': M1's slowest heads "
                    "never forget in a narrower state"
                )
