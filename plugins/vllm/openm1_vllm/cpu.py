"""On a CPU: fp32 logits from a bf16 head, and how kernels share their work among threads.

torch's product of two bf16 matrices rounds its sums to bf16 there, and a head widened to fp32 is
read at half the speed: the head is most of a small model's decode. So this is OpenM1's own product,
bf16 weights and fp32 sums, by the tile unit (AMX) where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.blocks import ROW_BLOCK, address_of, pack_tiles, project
from openm1.kernels.cpu.compile import kernel
from openm1.kernels.cpu.tiles import tiles_available

ZERO, ONE = np.int64(0), np.int64(1)
# What the tile unit is told: palette 1, all tiles of 16 rows of 64 bytes.
TILE_SETUP = np.zeros(64, np.uint8)
TILE_SETUP[0] = 1
TILE_SETUP[16:32].view(np.uint16)[:] = 64
TILE_SETUP[48:56] = 16


class WideHead(UnquantizedEmbeddingMethod):
    """For `ParallelLMHead`: x is fp32 [S, C], the weight bf16 [V, C], the logits fp32 [S, V]."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The weight stays as it is."""

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert bias is None
        return head_product(x, layer.weight)


def head_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T, [S, C] fp32 by [V, C] bf16, summed in fp32. With tiles `x` is rounded to bf16."""
    count, size = x.shape
    with_tiles = count > 1 and size % 32 == 0 and tiles()
    # Vectors take four inputs at a time, tiles sixteen.
    inputs = np.zeros((-(-count // 16) * 16, size), np.float32)
    inputs[:count] = x.numpy()
    packed = np.empty(inputs.shape if with_tiles else (0, size), np.uint16)
    if with_tiles:
        _pack(inputs, packed)
    out = torch.empty(-(-count // 4) * 4, len(weight))
    bits, logits = weight.detach().view(torch.int16).numpy(), out.numpy()

    def rows(first: int, stop: int) -> None:
        if count == 1:
            _one_product(bits, first, stop, inputs, logits)
            return
        scratch = np.empty((2 * ROW_BLOCK, ROW_BLOCK), np.float32)
        _product(bits, first, stop, inputs, count, logits, with_tiles, packed, scratch, TILE_SETUP)

    in_threads(rows, len(weight), ROW_BLOCK)
    return out[:count]


def in_threads(rows: Callable[[int, int], None], total: int, block: int) -> None:
    """rows(first, stop) for shares of `total`, in whole blocks, one for each of torch's threads."""
    blocks = -(-total // block)
    threads = min(torch.get_num_threads(), blocks)
    bounds = [min(total, blocks * t // threads * block) for t in range(threads + 1)]
    if threads == 1:
        rows(*bounds)
    else:
        list(_pool(torch.get_num_threads()).map(rows, bounds[:-1], bounds[1:]))


@kernel
def _pack(inputs, packed):
    size = inputs.shape[1]
    for i in range(len(inputs)):
        pack_tiles(inputs[i], 0, size, size, i, packed)


@kernel
def _one_product(w, first, stop, inputs, out):
    size = inputs.shape[1]
    stride, x, n = 2 * size, address_of(inputs), first
    while n + 8 <= stop:
        at, to = address_of(w) + n * stride, address_of(out) + 4 * n
        vector.dots_8x1_bf16_next(at, stride, x, ZERO, size, ZERO, to, ZERO)
        n += 8
    if n < stop:
        project(
            vector.BFLOAT16, address_of(w), ZERO, n, stop, inputs, ONE, size,
            address_of(out), ZERO, False, ZERO, inputs,
        )  # fmt: skip


@kernel
def _product(w, first, stop, inputs, count, out, tiles, packed, scratch, setup):
    if tiles:
        vector.tile_configure(address_of(setup))
    project(
        vector.BFLOAT16, address_of(w), ZERO, first, stop, inputs, count, inputs.shape[1],
        address_of(out), 4 * out.shape[1], tiles, address_of(packed), scratch,
    )  # fmt: skip
    if tiles:
        vector.tile_release()


@cache
def tiles() -> bool:
    return tiles_available()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """On the cores that vLLM has bound this process's threads to, one each."""
    tasks = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    cores = set().union(*(os.sched_getaffinity(task) for task in tasks))
    return ThreadPoolExecutor(threads, "openm1", lambda: os.sched_setaffinity(0, cores))
