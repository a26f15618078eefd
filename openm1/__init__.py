"""OpenM1: MiniMax-M1-class reasoning models, whole: model, learning, worlds, use.

Reading order: types, protocols, model/m1, kernels/lightning, engine/engine, rl/loop, recipes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openm1.engine.llm import LLM as LLM
    from openm1.model.config import M1Config as M1Config
    from openm1.model.m1 import M1ForCausalLM as M1ForCausalLM
    from openm1.types import Completion as Completion
    from openm1.types import Message as Message
    from openm1.types import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "openm1.engine.llm",
    "M1Config": "openm1.model.config",
    "M1ForCausalLM": "openm1.model.m1",
    "SamplingParams": "openm1.types",
    "Completion": "openm1.types",
    "Message": "openm1.types",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'openm1' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
