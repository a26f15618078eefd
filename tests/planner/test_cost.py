from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from openm1.planner.cost import (
    PRICE_TIERS,
    THINKING_BUDGETS,
    Service,
    run_cost,
    thought_cost,
    token_cost,
)
from openm1.planner.devices import DEVICES, Device, find_device
from openm1.planner.fleet import serving_layout
from openm1.planner.memory import FORMATS
from openm1.planner.models import read_shape
from openm1.planner.roofline import Utilisation, decode_bytes, decode_time, step_time

SERVICE = Service(
    shape=read_shape("minimax-m1"),
    format_=FORMATS["int8-experts"],
    device=DEVICES["h800"],
    layout=serving_layout(8),
    usd_per_hour=2.0,
    utilisation=Utilisation(),
)


def test_the_slower_limit_counts() -> None:
    device = Device(name="d", memory_bytes=1, peak_flops_per_s=100.0, peak_bytes_per_s=10.0)
    even = Utilisation(compute=0.5, bandwidth=0.5)
    by_compute, by_memory = (step_time(200, moved, device, 2, even) for moved in (5.0, 500.0))
    assert (by_compute.seconds, by_compute.bound) == (2.0, "compute")
    assert (by_memory.seconds, by_memory.bound) == (50.0, "memory")


def test_bytes_of_a_decoded_token_are_those_of_the_weights_it_uses() -> None:
    shape, format_ = read_shape("minimax-m1"), FORMATS["bfloat16"]
    moved = decode_bytes(shape, format_, num_sequences=1, context_tokens=1000)
    # Router and head in fp32, everything else in bf16; the embedding is a single row.
    routers = 80 * 32 * 6144
    in_bf16 = shape.num_active_params
    weights = 2 * in_bf16 + 4 * (routers + shape.head_params)
    assert moved["weights"] + moved["experts"] == pytest.approx(weights, rel=1e-12)
    assert moved["caches"] == 1000 * 40_960
    assert moved["states"] == 2 * 280 * 2**20


def test_many_sequences_read_all_experts() -> None:
    shape, format_ = read_shape("minimax-m1"), FORMATS["bfloat16"]
    one, many = (
        decode_bytes(shape, format_, num_sequences=n, context_tokens=1)["experts"]
        for n in (1, 1000)
    )
    assert many / one == pytest.approx(32 / 2)


def bound(model: str, batch: int) -> str:
    """Of eight H800 that decode so many sequences at a short context."""
    return decode_time(
        read_shape(model),
        FORMATS["bfloat16"],
        DEVICES["h800"],
        num_sequences=batch,
        context_tokens=64,
        num_devices=8,
    ).bound


def test_decode_turns_from_memory_to_compute() -> None:
    assert bound("qwen3-235b-a22b", 1) == "memory"
    assert bound("qwen3-235b-a22b", 10_000) == "compute"


def test_m1_states_keep_large_batches_at_the_memory() -> None:
    """560 MiB of states read and written for each token take longer than its FLOPs."""
    assert bound("minimax-m1", 10_000) == bound("minimax-m1", 1_000_000) == "memory"


def test_longer_thoughts_cost_more_than_in_proportion() -> None:
    short, long = (
        thought_cost(SERVICE, prompt_tokens=0, generated_tokens=budget)
        for budget in THINKING_BUDGETS
    )
    assert long.generated_tokens == 2 * short.generated_tokens
    assert long.usd > 2 * short.usd
    assert short.usd == pytest.approx(short.seconds * 8 * 2.0 / 3600 / short.batch)


def test_tokens_are_dearer_further_out() -> None:
    costs = [token_cost(SERVICE, tier.most_input_tokens, 7.0) for tier in PRICE_TIERS]
    for near, far in pairwise(costs):
        assert far.output_cny > near.output_cny and far.input_cny > near.input_cny
    dearer = token_cost(SERVICE, PRICE_TIERS[0].most_input_tokens, 14.0)
    assert dearer.output_cny == pytest.approx(2 * costs[0].output_cny)


def test_the_published_run() -> None:
    run = run_cost(
        read_shape("minimax-m1"),
        FORMATS["bfloat16"],
        DEVICES["h800"],
        num_devices=512,
        days=21,
        usd=534_700,
        reply_tokens=20_000,
        utilisation=Utilisation(),
    )
    assert run.device_hours == 512 * 21 * 24 == 258_048
    assert run.usd_per_hour == pytest.approx(2.072, abs=5e-4)
    # bf16 does not fit on eight of 80 GB.
    assert run.engine_devices == 16
    seconds = run.rollout_device_s_per_token + run.training_device_s_per_token
    assert run.num_tokens * seconds == pytest.approx(258_048 * 3600)


@pytest.mark.parametrize(
    "bad", [{"days": 0}, {"usd": float("nan")}, {"days": float("inf")}, {"num_devices": 8}]
)
def test_a_senseless_run_is_refused(bad: dict[str, float]) -> None:
    settings = {"num_devices": 512, "days": 21, "usd": 1.0, "reply_tokens": 1000} | bad
    with pytest.raises(ValueError, match=str(next(iter(bad)))):
        run_cost(
            read_shape("minimax-m1"),
            FORMATS["bfloat16"],
            DEVICES["h800"],
            utilisation=Utilisation(),
            **settings,  # pyright: ignore[reportArgumentType]
        )


def test_nonsense_is_refused() -> None:
    for share in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="compute utilisation"):
            Utilisation(compute=share)
    with pytest.raises(ValueError, match=r"device is 'h9000'.*h800"):
        find_device("h9000")
    with pytest.raises(ValueError, match="usd_per_hour is -1"):
        replace(SERVICE, usd_per_hour=-1.0)
    with pytest.raises(ValueError, match="devices is 3"):
        serving_layout(3)
    with pytest.raises(ValueError, match="batch is 100000"):
        thought_cost(SERVICE, prompt_tokens=0, generated_tokens=1000, batch=100_000)
    with pytest.raises(ValueError, match="cny_per_usd is 0"):
        token_cost(SERVICE, 1000, 0)


def test_the_cpu_at_hand_is_measured() -> None:
    device = find_device("cpu")
    # Between a very old core and a very large machine.
    assert 1e9 < device.peak_flops_per_s < 1e14
    assert 1e8 < device.peak_bytes_per_s < 1e13
