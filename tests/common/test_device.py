from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from openm1.common import device


@pytest.fixture
def setting() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_kept_setting_is_fp32(setting: None) -> None:
    kept = device.enable_fast_fp32_matmul()
    assert kept == torch.get_float32_matmul_precision()
    a, b = torch.randn(2, 300, 300)
    exact = a.double() @ b.double()
    assert float(((a @ b).double() - exact).norm() / exact.norm()) < device.PROBE_MAX_ERROR


@pytest.mark.parametrize(
    ("probes", "kept"),
    [
        ({"medium": (1e-7, 0.5)}, "medium"),
        ({"medium": (2e-3, 0.1), "high": (5e-7, 0.9)}, "high"),
        ({"medium": (1e-7, 1.2), "high": (1e-7, 1.2)}, "highest"),
        ({"medium": (2e-3, 0.1), "high": (2e-3, 0.1)}, "highest"),
    ],
)
def test_a_setting_must_be_accurate_and_not_slower(
    setting: None,
    monkeypatch: pytest.MonkeyPatch,
    probes: dict[str, tuple[float, float]],
    kept: str,
) -> None:
    def probe(_: torch.device) -> tuple[float, float]:
        return probes.get(torch.get_float32_matmul_precision(), (1e-7, 1.0))

    monkeypatch.setattr(device, "_probe", probe)
    assert device.enable_fast_fp32_matmul() == kept
    assert torch.get_float32_matmul_precision() == kept


def test_a_product_rounded_to_bf16_would_be_noticed() -> None:
    a, b = torch.randn(2, device.PROBE_SIZE, device.PROBE_SIZE)
    exact = a.double() @ b.double()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert float((rounded - exact).norm() / exact.norm()) > 100 * device.PROBE_MAX_ERROR


def test_dtypes_by_name() -> None:
    assert device.parse_dtype("bfloat16") is torch.bfloat16
    assert device.parse_dtype(torch.float64) is torch.float64
    for name in ("float16", "half", torch.int64):
        with pytest.raises(ValueError, match="allowed are float32, bfloat16, float64"):
            device.parse_dtype(name)


def test_default_device_is_usable() -> None:
    assert torch.zeros(1, device=device.default_device()).device == device.default_device()
