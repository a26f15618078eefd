"""The smallest fleet that holds a model and its contexts."""

from __future__ import annotations

from dataclasses import dataclass

from openm1.model.size import PAGE_TOKENS
from openm1.planner.devices import Device
from openm1.planner.memory import (
    DeviceMemory,
    Layout,
    WeightFormat,
    cache_bytes,
    serving_memory,
    stages,
)
from openm1.planner.shape import ModelShape

DEVICES_PER_NODE = 8
MAX_NODES = 32
USABLE = 0.9
"""Share of a device's memory for weights and caches; the rest is for activations, communication
buffers and the driver. vLLM's default has the same share."""


def usable_bytes(device: Device, usable: float) -> int:
    if not 0 < usable <= 1:
        raise ValueError(f"usable is {usable}; allowed is above 0, up to 1")
    return round(usable * device.memory_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    device: Device
    layout: Layout
    memory: DeviceMemory
    room_tokens: int | None
    """The longest single sequence that fits; None: any length."""


def smallest_fleet(
    shape: ModelShape,
    format_: WeightFormat,
    device: Device,
    *,
    num_sequences: int,
    context_tokens: int,
    usable: float = USABLE,
) -> Fit | None:
    """Nodes of eight, each a pipeline stage of eight tensor-parallel devices; None above 32."""
    for nodes in range(1, min(MAX_NODES, len(shape.layers)) + 1):
        layout = serving_layout(nodes * DEVICES_PER_NODE)
        fit = fit_on(
            shape,
            format_,
            device,
            layout,
            num_sequences=num_sequences,
            context_tokens=context_tokens,
            usable=usable,
        )
        if fit is not None:
            return fit
    return None


def serving_layout(num_devices: int) -> Layout:
    """Devices of a node share each layer; nodes are pipeline stages."""
    if num_devices in (1, 2, 4) or (num_devices > 0 and num_devices % DEVICES_PER_NODE == 0):
        tensor = min(num_devices, DEVICES_PER_NODE)
        return Layout(tensor=tensor, pipeline=num_devices // tensor)
    raise ValueError(f"devices is {num_devices}; allowed are 1, 2, 4 and multiples of 8")


def fit_on(
    shape: ModelShape,
    format_: WeightFormat,
    device: Device,
    layout: Layout,
    *,
    num_sequences: int,
    context_tokens: int,
    usable: float = USABLE,
) -> Fit | None:
    """None where it does not fit."""
    memory = serving_memory(
        shape, format_, layout, num_sequences=num_sequences, context_tokens=context_tokens
    )
    if memory.total_bytes > usable_bytes(device, usable):
        return None
    room = room_tokens(shape, format_, layout, usable_bytes(device, usable))
    return Fit(device=device, layout=layout, memory=memory, room_tokens=room)


def room_tokens(
    shape: ModelShape, format_: WeightFormat, layout: Layout, memory_bytes: int
) -> int | None:
    """The longest single sequence beside the weights in so much memory of each device."""
    one = serving_memory(shape, format_, layout, num_sequences=1, context_tokens=1)
    per_page = max(
        cache_bytes(layers, format_, layout.tensor, 1) for layers in stages(shape, layout.pipeline)
    )
    if per_page == 0:
        return None
    room = memory_bytes - one.weights_bytes - one.state_bytes
    return max(room, 0) // per_page * PAGE_TOKENS


def most_sequences(
    shape: ModelShape,
    format_: WeightFormat,
    device: Device,
    layout: Layout,
    *,
    context_tokens: int,
    usable: float = USABLE,
) -> int:
    """How many sequences of this length run side by side; 0 where the weights do not fit."""
    one = serving_memory(shape, format_, layout, num_sequences=1, context_tokens=context_tokens)
    room = usable_bytes(device, usable) - one.weights_bytes
    return max(room, 0) // (one.cache_bytes + one.state_bytes) * layout.data
