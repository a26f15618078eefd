"""Data-parallel training: every process takes its share of a step, and gradients are summed.

Started by torchrun, one process for each core; alone, nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openm1.data.packing import Example


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that train one model together."""

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> Processes:
        """The processes torchrun started, told by its environment; else this one alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            # Recipes train on the CPU, also where there is a GPU.
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this one writes what all have in common."""
        return self.rank == 0

    def share(self, examples: Sequence[Example]) -> list[Example]:
        """This process's examples of a step, about as many tokens as any other's.

        The longest first, each goes to whoever has the fewest tokens so far.
        """
        if self.count == 1:
            return list(examples)
        loads, mine = [0] * self.count, []
        for example in sorted(examples, key=lambda example: -len(example.token_ids)):
            taker = loads.index(min(loads))
            loads[taker] += len(example.token_ids)
            if taker == self.rank:
                mine.append(example)
        return mine

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """In place; every parameter has one in every process, and each ends with the same bits."""
        if self.count == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(
            gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each value's sum over all processes."""
        if self.count == 1:
            return list(values)
        total: Tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until all have come this far."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()
