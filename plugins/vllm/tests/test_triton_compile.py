"""The GPU kernels compile for GPUs this machine need not have."""

from __future__ import annotations

import os

import pytest
import triton
from openm1_vllm import triton_lightning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is 1"
)

KERNELS = ("_states_kernel", "_outputs_kernel", "_decode_kernel")
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""What one program may take of an A100, an H100, a B200."""
INPUTS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
FLOATS = ("slope_ptr", "initial_ptr", "before_ptr", "last_ptr", "states_ptr")
LONGS = ("bounds_ptr", "first_chunk_ptr", "sequence_ptr")
SIZES = {"D": 128, "COLUMNS": 64, "CHUNK": 64}


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("inputs", ["*bf16", "*fp32"])
def test_kernels_compile_and_fit(capability, inputs):
    types = dict.fromkeys(INPUTS, inputs) | dict.fromkeys(FLOATS, "*fp32")
    types |= dict.fromkeys(LONGS, "*i64") | {"pages_ptr": "*i32"}
    for name in KERNELS:
        kernel = getattr(triton_lightning, name)
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={n: "constexpr" if n in SIZES else types.get(n, "i32") for n in names},
            constexprs={(names.index(n),): size for n, size in SIZES.items() if n in names},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert "cubin" in compiled.asm
        assert compiled.metadata.shared <= SHARED_BYTES[capability]
