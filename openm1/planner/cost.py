"""What a thought, a million tokens and a training run cost, against what was asked or paid."""

from __future__ import annotations

import math
from dataclasses import dataclass

from openm1.planner.devices import Device
from openm1.planner.fleet import most_sequences, smallest_fleet
from openm1.planner.flops import total_flops, training_flops
from openm1.planner.memory import Layout, WeightFormat
from openm1.planner.roofline import Utilisation, decode_time, prefill_s, reply_s
from openm1.planner.shape import ModelShape

DAY_S, HOUR_S = 86_400, 3600
MILLION = 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceTier:
    """M1's prices at launch, in yuan for a million tokens, by the length of the input."""

    least_input_tokens: int
    most_input_tokens: int
    input_cny: float
    output_cny: float


# Published with the launch in June 2025. The first begins at 0; 1,024 stands for a short prompt.
PRICE_TIERS = (
    PriceTier(least_input_tokens=1024, most_input_tokens=32_768, input_cny=0.8, output_cny=8.0),
    PriceTier(least_input_tokens=32_768, most_input_tokens=131_072, input_cny=1.2, output_cny=16.0),
    PriceTier(
        least_input_tokens=131_072, most_input_tokens=1_048_576, input_cny=2.4, output_cny=24.0
    ),
)
THINKING_BUDGETS = (40_960, 81_920)
"""Of M1-40k and M1-80k, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One engine: a model on devices that it has to itself."""

    shape: ModelShape
    format_: WeightFormat
    device: Device
    layout: Layout
    usd_per_hour: float
    """Of one device."""
    utilisation: Utilisation

    def __post_init__(self) -> None:
        if not 0 <= self.usd_per_hour < math.inf:
            raise ValueError(f"usd_per_hour is {self.usd_per_hour}; allowed is 0 or more")

    @property
    def usd_per_s(self) -> float:
        """Of all devices."""
        return self.usd_per_hour * self.layout.num_devices / HOUR_S

    def batch(self, context_tokens: int, asked: int | None) -> int:
        """As many sequences as memory holds, or as asked; raises ValueError where it holds less."""
        most = most_sequences(
            self.shape, self.format_, self.device, self.layout, context_tokens=context_tokens
        )
        wanted = most if asked is None else asked
        if not 1 <= wanted <= most:
            raise ValueError(
                f"batch is {wanted}; {self.layout.num_devices} x {self.device.name} hold 1 to "
                f"{most} sequences of {context_tokens} tokens"
                if most
                else f"{self.layout.num_devices} x {self.device.name} do not hold one sequence of "
                f"{context_tokens} tokens"
            )
        return wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class ThoughtCost:
    generated_tokens: int
    batch: int
    seconds: float
    """From the first token to the last."""
    tokens_per_s: float
    """Of one sequence, on average."""
    usd: float
    """Of one of the `batch` thoughts, its prompt included."""


def thought_cost(
    service: Service, *, prompt_tokens: int, generated_tokens: int, batch: int | None = None
) -> ThoughtCost:
    """A full engine, all of whose sequences think as long."""
    if prompt_tokens < 0 or generated_tokens < 1:
        raise ValueError(
            f"prompt_tokens is {prompt_tokens}, generated_tokens {generated_tokens}; allowed are "
            "0 and 1 or more"
        )
    size = service.batch(prompt_tokens + generated_tokens, batch)
    common = {
        "num_devices": service.layout.num_devices,
        "utilisation": service.utilisation,
    }
    writing = reply_s(
        service.shape,
        service.format_,
        service.device,
        num_sequences=size,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        **common,
    )
    reading = 0.0
    if prompt_tokens:
        reading = prefill_s(service.shape, service.device, prompt_tokens=prompt_tokens, **common)
    return ThoughtCost(
        generated_tokens=generated_tokens,
        batch=size,
        seconds=writing,
        tokens_per_s=generated_tokens / writing,
        usd=(writing / size + reading) * service.usd_per_s,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCost:
    """What a million tokens cost at one length, the engine full and never idle."""

    context_tokens: int
    batch: int
    input_cny: float
    """Read, as prompts of this length."""
    output_cny: float
    """Written after so many."""


def token_cost(service: Service, context_tokens: int, cny_per_usd: float) -> TokenCost:
    if not 0 < cny_per_usd < math.inf:
        raise ValueError(f"cny_per_usd is {cny_per_usd}; allowed is above 0")
    size = service.batch(context_tokens, None)
    common = {"num_devices": service.layout.num_devices, "utilisation": service.utilisation}
    reading = prefill_s(service.shape, service.device, prompt_tokens=context_tokens, **common)
    step = decode_time(
        service.shape,
        service.format_,
        service.device,
        num_sequences=size,
        context_tokens=context_tokens,
        **common,
    )
    cny_per_s = service.usd_per_s * cny_per_usd
    return TokenCost(
        context_tokens=context_tokens,
        batch=size,
        input_cny=reading / context_tokens * MILLION * cny_per_s,
        output_cny=step.seconds / size * MILLION * cny_per_s,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """An RL run: each token is written once, and trained on once."""

    device_hours: float
    usd: float
    usd_per_hour: float
    peak_flops: float
    """What all devices could do in that time at their peak."""
    engine_devices: int
    """Of one rollout engine: the smallest fleet that holds the weights."""
    batch: int
    rollout_device_s_per_token: float
    training_device_s_per_token: float
    num_tokens: float
    """Written and trained on, if no device was ever idle."""
    num_replies: float
    rollout_share: float
    """Of the time, or of the devices."""


def run_cost(
    shape: ModelShape,
    format_: WeightFormat,
    device: Device,
    *,
    num_devices: int,
    days: float,
    usd: float,
    reply_tokens: int,
    utilisation: Utilisation,
) -> RunCost:
    """What a run of this length and price can have been, for replies of a mean length.

    An upper bound: devices switch between writing and training without loss, prompts, tools and
    rewards cost nothing, and layers are recomputed in training.
    """
    for name, value in {"num_devices": num_devices, "days": days, "reply_tokens": reply_tokens,
                        "usd": usd}.items():  # fmt: skip
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; allowed is above 0, and finite")
    fit = smallest_fleet(shape, format_, device, num_sequences=1, context_tokens=reply_tokens)
    if fit is None or fit.layout.num_devices > num_devices:
        needed = "over 256" if fit is None else fit.layout.num_devices
        raise ValueError(
            f"num_devices is {num_devices}; one engine of {shape.name} alone takes {needed}"
        )
    engine = fit.layout.num_devices
    batch = most_sequences(shape, format_, device, fit.layout, context_tokens=reply_tokens)
    writing = reply_s(
        shape,
        format_,
        device,
        num_sequences=batch,
        prompt_tokens=0,
        generated_tokens=reply_tokens,
        num_devices=engine,
        utilisation=utilisation,
    )
    rollout = writing * engine / (batch * reply_tokens)
    flops = training_flops(shape, num_sequences=1, sequence_tokens=reply_tokens, recompute=True)
    training = total_flops(flops) / reply_tokens / (
        device.peak_flops_per_s * utilisation.compute
    )  # fmt: skip
    device_s = num_devices * days * DAY_S
    tokens = device_s / (rollout + training)
    return RunCost(
        device_hours=device_s / HOUR_S,
        usd=usd,
        usd_per_hour=usd / (device_s / HOUR_S),
        peak_flops=device_s * device.peak_flops_per_s,
        engine_devices=engine,
        batch=batch,
        rollout_device_s_per_token=rollout,
        training_device_s_per_token=training,
        num_tokens=tokens,
        num_replies=tokens / reply_tokens,
        rollout_share=rollout / (rollout + training),
    )
