"""The faults of vLLM 0.32's own lightning code: an input, what is right and what comes out.

    TRITON_INTERPRET=1 python plugins/vllm/tests/upstream.py

docs/vllm-upstream.md quotes what this prints. Nothing here is part of the plugin: the plugin does
not use the code at fault.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

from openm1.kernels.lightning.naive import lightning_naive
from openm1.kernels.packing import PackedLayout
from openm1.model.config import M1_80K
from openm1.model.lightning_attention import layer_slopes


def main() -> None:
    kernels = upstream_kernels()
    off_by_one_decay(kernels)
    decode_kernel(kernels)
    one_token_prompts()
    defaults()


def upstream_kernels() -> ModuleType:
    """vllm/model_executor/layers/lightning_attn.py, with Triton though there is no GPU."""
    import vllm
    import vllm.triton_utils

    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
    file = Path(vllm.__file__).parent / "model_executor/layers/lightning_attn.py"
    spec = importlib.util.spec_from_file_location("upstream_lightning", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def off_by_one_decay(kernels: ModuleType, dim: int = 128) -> None:
    """Prefill of 300 tokens (a block of 256 and a rest) after a state that is not 0."""
    length = 300
    slopes = layer_slopes(M1_80K, 0)[[0, 31, 63]]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, length, 3, dim, generator=generator)
    state = torch.randn(1, 3, dim, dim, generator=generator)
    wide = (x.double() for x in (q, k, v))
    expected, last = lightning_naive(
        *wide, slopes.double(), layout=PackedLayout([length]), initial_state=state.double()
    )
    packed = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    out, history = kernels.lightning_attention(*packed, slopes, kv_history=state.clone())
    out, got_last = out[0].transpose(0, 1).double(), history[:, :, -1].double()
    print("prefill: lightning_attention, 300 tokens, with a state before them")
    for row, slope in enumerate(slopes.tolist()):
        error = relative(out[:, row], expected[:, row])
        print(
            f"  slope {slope:.6f}: output wrong by {error:.1e} of its maximum, last state by "
            f"{relative(got_last[:, row], last[:, row]):.1e}"
        )
    # The state's share of each output, one step younger than it should be, explains all of it.
    zero = torch.zeros_like(state)
    packed = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    alone, _ = kernels.lightning_attention(*packed, slopes, kv_history=zero)
    from_state = (out - alone[0].transpose(0, 1).double())[:256]
    older = from_state * torch.exp(-slopes.double())[None, :, None]
    steps = torch.arange(1, 257, dtype=torch.float64)[:, None, None]
    share = torch.einsum("thd,hde->the", q[:256].double(), state[0].double())
    share = share * torch.exp(-slopes.double()[None, :, None] * steps)
    print(
        f"  the state's share in the first block: wrong by {relative(from_state, share):.1e}; "
        f"times e^-slope: {relative(older, share):.1e}"
    )


def decode_kernel(kernels: ModuleType, dim: int = 64) -> None:
    slopes = layer_slopes(M1_80K, 0)[[0, 63]]
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 4, 2, dim, generator=generator)
    states = torch.randn(4, 2, dim, dim, generator=generator)
    expected, last = lightning_naive(
        *(x.double() for x in (q, k, v)),
        slopes.double(),
        layout=PackedLayout([1, 1, 1, 1]),
        initial_state=states.double(),
    )
    rows = (x[:, :, None].contiguous() for x in (q, k, v))
    slots = torch.arange(4, dtype=torch.int32)
    out = kernels.linear_decode_forward_triton(*rows, states, slopes, slots)
    error = relative(out.unflatten(-1, (2, dim)).double(), expected)
    print(f"decode: output wrong by {error:.1e}, state by {relative(states.double(), last):.1e}")


def one_token_prompts() -> None:
    """How a batch of one decode and one fresh prompt of one token is split."""
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills

    class Batch:
        max_query_len, num_reqs, num_actual_tokens = 1, 2, 2
        query_start_loc_cpu = torch.tensor([0, 1, 2])
        is_prefilling = torch.tensor([False, True])

    got = split_decodes_and_prefills(Batch(), decode_threshold=1)
    right = split_decodes_and_prefills(
        Batch(), decode_threshold=1, treat_short_extends_as_decodes=False
    )
    print("one-token prompt beside one decode: (decodes, prefills, their tokens)")
    print(f"  as LinearAttentionMetadataBuilder calls it: {got}")
    print(f"  with treat_short_extends_as_decodes=False: {right}")


def defaults() -> None:
    """What a linear-attention layer of a bf16 model gets where the user says nothing."""
    import inspect

    from vllm.model_executor.layers.mamba.linear import minimax_linear_attn
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator

    [dtype] = MambaStateDtypeCalculator.linear_attention_state_dtype(torch.bfloat16, "auto")
    slopes = torch.stack([layer_slopes(M1_80K, i) for i in range(80) if i % 8 != 7])
    stuck = int((torch.exp(-slopes).to(torch.bfloat16) == 1).sum())
    print(f"state of a bf16 model: {dtype}; {stuck} of M1's {slopes.numel()} decays are 1 in it")
    source = inspect.getsource(minimax_linear_attn.MiniMaxText01LinearAttention)
    eps = source.split("MiniMaxText01RMSNormTP(")[1].split("eps=")[1].split(",")[0]
    print(f"norm of the output: eps {eps}; the published modeling file has 1e-6")


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    sys.exit(main())
