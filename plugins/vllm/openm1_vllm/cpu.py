"""On a CPU: fp32 logits from a bf16 head, and how kernels share their work among threads.

torch's product of two bf16 matrices rounds its sums to bf16 there, and a head widened to fp32 is
read at half the speed: the head is most of a small model's decode. So this is OpenM1's own product,
bf16 weights and fp32 sums, by the tile unit (AMX) where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.blocks import ROW_BLOCK, address_of, pack_tiles, project
from openm1.kernels.cpu.compile import kernel, piece
from openm1.kernels.cpu.tiles import tiles_available

ZERO = np.int64(0)
MOST_INPUTS = 8 if vector.LANES == 16 else 4
"""What vectors take at a time: as many sums as there are registers for."""
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
    bits = weight.detach().view(torch.int16).numpy()
    if count == 1:
        one = torch.empty(1, len(weight))
        in_threads(partial(_one_product, bits, x.contiguous().numpy(), one.numpy()), len(weight), 1)
        return one
    with_tiles = size % 32 == 0 and tiles()
    group = 16 if with_tiles else 4 if count <= 4 else MOST_INPUTS
    inputs = np.zeros((-(-count // group) * group, size), np.float32)
    inputs[:count] = x.numpy()
    out = torch.empty(len(inputs), len(weight))
    logits = out.numpy()
    if not with_tiles:
        in_threads(partial(_product, bits, inputs, group, logits), len(weight), ROW_BLOCK)
        return out[:count]
    packed = np.empty(inputs.shape, np.uint16)
    _pack(inputs, packed)

    def rows(first: int, stop: int) -> None:
        scratch = np.empty((2 * ROW_BLOCK, ROW_BLOCK), np.float32)
        _tile_product(bits, inputs, count, logits, packed, scratch, TILE_SETUP, first, stop)

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
def _one_product(w, x, out, first, stop):
    size = x.shape[1]
    for n in range(first, stop):
        row, to = address_of(w) + 2 * n * size, address_of(out) + 4 * n
        vector.dots_1x1_bf16_ahead(row, ZERO, address_of(x), ZERO, size, ZERO, to, ZERO)


@kernel
def _product(w, inputs, group, out, first, stop):
    """A block of rows by all inputs, `group` of them at a time: 4 or 8."""
    size, count = inputs.shape[1], len(inputs)
    stride, x_stride, out_stride = 2 * size, 4 * size, 4 * out.shape[1]
    pairs = first + (stop - first) // 2 * 2
    for begin in range(first, pairs, ROW_BLOCK):
        for m in range(0, count, group):
            x = address_of(inputs) + m * x_stride
            for n in range(begin, min(begin + ROW_BLOCK, pairs), 2):
                row, to = address_of(w) + n * stride, address_of(out) + m * out_stride + 4 * n
                if group == 4:
                    vector.dots_2x4_bf16_ahead(row, stride, x, x_stride, size, ZERO, to, out_stride)
                else:
                    vector.dots_2x8_bf16_ahead(row, stride, x, x_stride, size, ZERO, to, out_stride)
    if pairs < stop:
        _rows(w, inputs, count, out, False, inputs, inputs, pairs, stop)


@kernel
def _tile_product(w, inputs, count, out, packed, scratch, setup, first, stop):
    vector.tile_configure(address_of(setup))
    _rows(w, inputs, count, out, True, packed, scratch, first, stop)
    vector.tile_release()


@piece
def _rows(w, inputs, count, out, tiles, packed, scratch, first, stop):
    project(
        vector.BFLOAT16, address_of(w), ZERO, first, stop, inputs, count, inputs.shape[1],
        address_of(out), 4 * out.shape[1], tiles, address_of(packed), scratch,
    )  # fmt: skip


@cache
def tiles() -> bool:
    return tiles_available()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """On the cores that vLLM has bound this process's threads to, one each."""
    tasks = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    cores = set().union(*(os.sched_getaffinity(task) for task in tasks))
    return ThreadPoolExecutor(threads, "openm1", lambda: os.sched_setaffinity(0, cores))
