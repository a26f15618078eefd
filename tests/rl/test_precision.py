"""The example's figures: a bf16 head under large activations, and the fp32 head."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_fp32_head.py"


@pytest.mark.slow
def test_the_fp32_head_mends_what_a_bf16_head_breaks():
    results = runpy.run_path(str(EXAMPLE))["results"]
    broken, whole = results["Bf16Head"], results["M1ForCausalLM"]
    assert broken["rl/probability_corr"] < 0.95
    assert broken["rl/probability_max_difference"] > 0.5
    assert broken["rl/sampler_kl_nats"] > 0.5
    assert broken["reward"] < 0.6
    # What is left is the bf16 of the layers below.
    assert whole["rl/probability_corr"] > 0.999
    assert whole["rl/probability_max_difference"] < 0.05
    assert abs(whole["rl/sampler_kl_nats"]) < 1e-3
    assert whole["reward"] > 0.9
