"""What lies in one device's memory: weights, caches, and in training gradients, optimizer and
activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

from openm1.model.size import PAGE_TOKENS, STATE_BYTES
from openm1.planner.attention import Attention, GroupedQuery, Latent, Lightning
from openm1.planner.shape import PARTS, FeedForward, Layer, ModelShape, Part, Weight

SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """Bytes of one number in each part of a model. OpenM1 keeps router and head in fp32."""

    part_bytes: Mapping[Part, int]
    scaled: tuple[Part, ...] = ()
    """Parts that have an fp32 scale for each block of a matrix."""
    block: tuple[int, int | None] = (1, None)
    """Rows and columns of a block; None is all columns."""
    compute_bytes: int = 2
    """Of an activation, a key or a value."""

    def bytes_of(self, weight: Weight, copies: float) -> float:
        """Of so many copies of a matrix."""
        scales = 0
        if weight.part in self.scaled:
            rows, columns = self.block[0], self.block[1] or weight.columns
            scales = -(-weight.rows // rows) * -(-weight.columns // columns) * SCALE_BYTES
        each = weight.rows * weight.columns * self.part_bytes[weight.part] + scales
        return each * copies


def _parts(base: int, **others: int) -> dict[Part, int]:
    sizes: dict[Part, int] = {part: others.get(part, base) for part in PARTS}
    sizes["router"] = sizes["head"] = 4
    return sizes


FORMATS: dict[str, WeightFormat] = {
    "bfloat16": WeightFormat(part_bytes=_parts(2)),
    "float32": WeightFormat(part_bytes=_parts(4), compute_bytes=4),
    # As `quantize_int8` leaves a bf16 model.
    "int8": WeightFormat(part_bytes=_parts(2, experts=1, attention=1),
                         scaled=("experts", "attention")),
    "int8-experts": WeightFormat(part_bytes=_parts(2, experts=1), scaled=("experts",)),
    # As DeepSeek publishes its weights: a scale for 128 x 128 numbers.
    "fp8": WeightFormat(part_bytes=_parts(2, experts=1, attention=1),
                        scaled=("experts", "attention"), block=(128, 128)),
}  # fmt: skip

Shard = Literal["nothing", "optimizer", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a model is laid over devices."""

    tensor: int = 1
    """Devices that share each matrix, its heads and its caches."""
    expert: int = 1
    """Groups of devices that have different experts. Where it is below `tensor`, experts are also
    cut; above it, they lie on `data` copies too."""
    pipeline: int = 1
    """Stages of consecutive layers."""
    data: int = 1
    """Copies that see different sequences."""
    shard: Shard = "nothing"
    """What copies divide among themselves: "optimizer" states, or "all" with weights and gradients
    (FSDP)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "shard" and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}; allowed is an integer of at least 1")
        large, small = max(self.expert, self.tensor), min(self.expert, self.tensor)
        if large % small or self.expert > self.tensor * self.data:
            raise ValueError(
                f"expert is {self.expert}; allowed are divisors or multiples of tensor "
                f"({self.tensor}) up to tensor x data ({self.tensor * self.data})"
            )

    @property
    def num_devices(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Bytes on the fullest device."""

    weights_bytes: int
    cache_bytes: int
    """Pages of keys and values, or latents."""
    state_bytes: int
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    activations_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def weight_bytes(weights: list[Weight], format_: WeightFormat, layout: Layout) -> int:
    """On one device, of weights that lie on its pipeline stage.

    Norms and routers are on every device of a stage. Projections to fewer heads than there are
    devices are counted as divided, though such heads are copied: less than 1 % in M1 and R1.
    """
    total = 0.0
    for weight in weights:
        share = layout.tensor
        if weight.part == "experts":
            share = max(layout.expert, layout.tensor) if weight.copies > 1 else layout.tensor
        elif weight.part in ("norms", "router"):
            share = 1
        total += format_.bytes_of(weight, weight.copies / share)
    return round(total)


def stages(shape: ModelShape, pipeline: int) -> list[tuple[Layer, ...]]:
    """Layers of each pipeline stage, as even as they divide."""
    count = len(shape.layers)
    if pipeline > count:
        raise ValueError(f"pipeline is {pipeline}; allowed are 1 to {count} (layers)")
    cuts = [count * i // pipeline for i in range(pipeline + 1)]
    return [shape.layers[a:b] for a, b in pairwise(cuts)]


def cache_bytes(layers: tuple[Layer, ...], format_: WeightFormat, tensor: int, pages: int) -> int:
    """Of so many pages on one device. Heads that are fewer than devices are copied, and so is a
    latent that all heads share."""
    numbers = 0
    for layer in layers:
        attention = layer.attention
        whole = attention.cache_numbers_per_token
        if isinstance(attention, GroupedQuery):
            heads = attention.num_key_value_heads
            numbers += whole // heads * -(-heads // tensor)
        elif isinstance(attention, Latent) and not attention.absorbed:
            numbers += whole // attention.num_heads * -(-attention.num_heads // tensor)
        else:
            numbers += whole
    return numbers * format_.compute_bytes * PAGE_TOKENS * pages


def state_bytes(layers: tuple[Layer, ...], tensor: int) -> int:
    """Of one sequence on one device, fp32 always."""
    total = 0
    for layer in layers:
        attention = layer.attention
        if isinstance(attention, Lightning):
            heads = -(-attention.num_heads // tensor)
            total += heads * attention.head_dim**2 * STATE_BYTES
    return total


def serving_memory(
    shape: ModelShape,
    format_: WeightFormat,
    layout: Layout,
    *,
    num_sequences: int,
    context_tokens: int,
) -> DeviceMemory:
    """To decode sequences of this length, divided among the data copies."""
    if num_sequences < 1 or context_tokens < 1:
        raise ValueError(
            f"num_sequences is {num_sequences}, context_tokens {context_tokens}; allowed is 1 "
            "or more"
        )
    here = -(-num_sequences // layout.data)
    pages = here * -(-context_tokens // PAGE_TOKENS)
    best: DeviceMemory | None = None
    for i, layers in enumerate(stages(shape, layout.pipeline)):
        weights = _stage_weights(shape, layers, i, layout.pipeline)
        memory = DeviceMemory(
            weights_bytes=weight_bytes(weights, format_, layout)
            // (layout.data if layout.shard == "all" else 1),
            cache_bytes=cache_bytes(layers, format_, layout.tensor, pages),
            state_bytes=here * state_bytes(layers, layout.tensor),
        )
        if best is None or memory.total_bytes > best.total_bytes:
            best = memory
    assert best is not None
    return best


def training_memory(
    shape: ModelShape,
    format_: WeightFormat,
    layout: Layout,
    *,
    num_tokens: int,
    recompute: bool,
) -> DeviceMemory:
    """One micro-batch of `num_tokens` tokens on each data copy.

    AdamW: two fp32 moments for each parameter, a third fp32 copy where weights are narrower; fp32
    gradients. Each pipeline stage holds the activations of as many micro-batches as there are
    stages from it on (one forward, one backward in turn).
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; allowed is an integer of at least 1")
    if format_.scaled:
        raise ValueError("quantised weights cannot be trained; allowed are bfloat16 and float32")
    fp32 = WeightFormat(part_bytes=_parts(4), compute_bytes=4)
    copies = 3 if format_.part_bytes["experts"] < 4 else 2
    best: DeviceMemory | None = None
    for i, layers in enumerate(stages(shape, layout.pipeline)):
        weights = _stage_weights(shape, layers, i, layout.pipeline)
        full = weight_bytes(weights, fp32, layout)
        all_, some = (layout.data if layout.shard in kinds else 1
                      for kinds in (("all",), ("all", "optimizer")))  # fmt: skip
        memory = DeviceMemory(
            weights_bytes=weight_bytes(weights, format_, layout) // all_,
            cache_bytes=0,
            state_bytes=0,
            gradients_bytes=full // all_,
            optimizer_bytes=copies * full // some,
            activations_bytes=num_tokens
            * activation_bytes(
                shape, layers, format_, layout.tensor, recompute, layout.pipeline - i
            ),
        )
        if best is None or memory.total_bytes > best.total_bytes:
            best = memory
    assert best is not None
    return best


def activation_bytes(
    shape: ModelShape,
    layers: tuple[Layer, ...],
    format_: WeightFormat,
    tensor: int,
    recompute: bool,
    num_micro_batches: int = 1,
) -> int:
    """Of one token of each micro-batch: what backward needs again of each operation's inputs.

    With activation checkpointing each layer's input is kept, and one layer whole at a time. Logits
    are left out: the loss takes them some rows at a time.
    """
    per_layer = [_layer_numbers(layer, shape.hidden_size, tensor) for layer in layers]
    if recompute:
        numbers = num_micro_batches * len(layers) * shape.hidden_size + max(per_layer)
    else:
        numbers = num_micro_batches * sum(per_layer)
    return numbers * format_.compute_bytes


def _layer_numbers(layer: Layer, hidden: int, tensor: int) -> int:
    """The input and output of both norms; then each block's own, of which devices have a share."""
    inner = _attention_numbers(layer.attention) + _feed_forward_numbers(layer.feed_forward, hidden)
    return 4 * hidden + -(-inner // tensor)


def _attention_numbers(attention: Attention) -> int:
    if isinstance(attention, Lightning):
        # q, k, v before and after SiLU, o, its norm, the gate before and after, their product.
        return 11 * attention.size
    if isinstance(attention, GroupedQuery):
        # q and o; k and v.
        return 2 * attention.num_heads * attention.head_dim + attention.cache_numbers_per_token
    heads = attention.num_heads
    latents = attention.q_lora_rank + attention.kv_lora_rank
    # q, k, v and o of all heads, and the latents that they come from.
    return heads * (2 * attention.qk_head_dim + 2 * attention.v_head_dim) + 2 * latents


def _feed_forward_numbers(block: FeedForward, hidden: int) -> int:
    """Each chosen expert's input and output, w1 x, its SiLU, w3 x, and the product."""
    chosen = block.num_experts_per_tok * (4 * block.width + 2 * hidden)
    return chosen + 4 * block.shared_width + (block.num_experts if block.num_experts > 1 else 0)


def _stage_weights(
    shape: ModelShape, layers: tuple[Layer, ...], stage: int, num_stages: int
) -> list[Weight]:
    """The embedding lies on the first stage, final norm and head on the last."""
    weights = [weight for layer in layers for weight in layer.weights(shape.hidden_size)]
    for weight in shape.outer_weights():
        if (stage == 0) if weight.part == "embedding" else (stage == num_stages - 1):
            weights.append(weight)
    return weights
