"""Time from FLOPs and bytes: whichever of the two limits a device more.

What is left out makes real runs slower: communication between devices, launches, scheduling. It is
put into utilisation, the share of a peak that is reached, which is a number one has to give.
"""

from __future__ import annotations

from dataclasses import dataclass

from openm1.model.size import STATE_BYTES
from openm1.planner.devices import Device
from openm1.planner.flops import decode_flops, prefill_flops, total_flops
from openm1.planner.memory import WeightFormat
from openm1.planner.shape import ModelShape

# Time per token is a straight line in the context up to where compute takes over from memory.
CONTEXT_SAMPLES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilisation:
    """Shares of the peaks that are reached."""

    compute: float = 0.4
    bandwidth: float = 0.6

    def __post_init__(self) -> None:
        for name in ("compute", "bandwidth"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name} utilisation is {value}; allowed is above 0, up to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    flops: int
    moved_bytes: float
    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> str:
        return "compute" if self.compute_s > self.memory_s else "memory"


def step_time(
    flops: int, moved_bytes: float, device: Device, num_devices: int, utilisation: Utilisation
) -> StepTime:
    """Work divided evenly over the devices."""
    if num_devices < 1:
        raise ValueError(f"num_devices is {num_devices}; allowed is an integer of at least 1")
    compute = device.peak_flops_per_s * num_devices * utilisation.compute
    bandwidth = device.peak_bytes_per_s * num_devices * utilisation.bandwidth
    return StepTime(
        flops=flops,
        moved_bytes=moved_bytes,
        compute_s=flops / compute,
        memory_s=moved_bytes / bandwidth,
    )


def decode_bytes(
    shape: ModelShape, format_: WeightFormat, *, num_sequences: int, context_tokens: int
) -> dict[str, float]:
    """Moved by one step in which each sequence gets a token at this context.

    Of the experts those that some sequence chose, if all are chosen alike often: E (1 - (1 -
    K/E)^S). States are read and written. The new token's own keys are among those read.
    """
    weights = experts = 0.0
    for weight in shape.weights():
        if weight.part == "experts":
            unused = (1 - weight.used / weight.copies) ** num_sequences
            experts += format_.bytes_of(weight, weight.copies * (1 - unused))
        elif weight.part != "embedding" or shape.tie_word_embeddings:
            weights += format_.bytes_of(weight, 1)
    cache = shape.cache_numbers_per_token() * format_.compute_bytes * context_tokens
    return {
        "weights": weights,
        "experts": experts,
        "caches": float(num_sequences * cache),
        "states": float(2 * num_sequences * shape.state_numbers() * STATE_BYTES),
    }


def decode_time(
    shape: ModelShape,
    format_: WeightFormat,
    device: Device,
    *,
    num_sequences: int,
    context_tokens: int,
    num_devices: int = 1,
    utilisation: Utilisation = Utilisation(),
) -> StepTime:
    """One token for each sequence, itself the last of `context_tokens`."""
    if num_sequences < 1 or context_tokens < 1:
        raise ValueError(
            f"num_sequences is {num_sequences}, context_tokens {context_tokens}; allowed is 1 "
            "or more"
        )
    flops = num_sequences * total_flops(decode_flops(shape, 1, past_tokens=context_tokens - 1))
    moved = decode_bytes(shape, format_, num_sequences=num_sequences, context_tokens=context_tokens)
    return step_time(flops, sum(moved.values()), device, num_devices, utilisation)


def reply_s(
    shape: ModelShape,
    format_: WeightFormat,
    device: Device,
    *,
    num_sequences: int,
    prompt_tokens: int,
    generated_tokens: int,
    num_devices: int,
    utilisation: Utilisation,
) -> float:
    """Seconds to write replies of this length side by side, their prompts read already."""
    count = min(CONTEXT_SAMPLES, generated_tokens)
    seconds = 0.0
    for i in range(count):
        middle = prompt_tokens + max(1, round(generated_tokens * (2 * i + 1) / (2 * count)))
        step = decode_time(
            shape,
            format_,
            device,
            num_sequences=num_sequences,
            context_tokens=middle,
            num_devices=num_devices,
            utilisation=utilisation,
        )
        seconds += step.seconds * generated_tokens / count
    return seconds


def prefill_s(
    shape: ModelShape,
    device: Device,
    *,
    prompt_tokens: int,
    num_devices: int,
    utilisation: Utilisation,
) -> float:
    """Seconds of one prompt; long ones are bound by compute, and short ones share a step."""
    flops = total_flops(prefill_flops(shape, prompt_tokens))
    return step_time(flops, 0.0, device, num_devices, utilisation).seconds
