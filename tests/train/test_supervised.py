from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from openm1.common.track import read_metrics
from openm1.data.packing import Example
from openm1.train.checkpoint import RunFolder
from openm1.train.optim import AdamWConfig
from openm1.train.schedule import Schedule
from openm1.train.supervised import Source, SupervisedConfig, supervised_step, train_supervised

from .tiny import counting_source, random_examples, tiny_model, weights

CONFIG = SupervisedConfig(
    num_steps=7,
    max_tokens=20,
    optimizer=AdamWConfig(learning_rate=0.02, weight_decay=0.1),
    schedule=Schedule(warmup_steps=2, decay_share=0.5),
    save_every_steps=3,
)


class Stopped(Exception):
    pass


def run(path: Path, source: Source = counting_source, config: SupervisedConfig = CONFIG):
    """The final weights and the metrics that do not measure time."""
    model = tiny_model(dtype=torch.float32)
    folder = RunFolder.open(path, config)
    last = train_supervised(model, source, config, folder)
    assert last == folder.latest()
    rows = read_metrics(folder.metrics)
    return weights(model), [
        {name: value for name, value in row.items() if not name.endswith("_per_s")} for row in rows
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory):
    return run(tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_a_run_stopped_at_any_step_and_resumed_is_the_run_left_alone(
    tmp_path: Path, straight, stop: int
):
    def failing(step: int) -> Sequence[Example]:
        if step == stop:
            raise Stopped
        return counting_source(step)

    with pytest.raises(Stopped):
        run(tmp_path, failing)
    final, metrics = run(tmp_path)
    assert torch.equal(final, straight[0])
    assert metrics == straight[1]
    assert [row["step"] for row in metrics] == list(range(CONFIG.num_steps))


def test_a_finished_run_is_not_trained_again(tmp_path: Path, straight):
    run(tmp_path)

    def forbidden(step: int) -> Sequence[Example]:
        raise AssertionError(f"asked for step {step}")

    final, metrics = run(tmp_path, forbidden)
    assert torch.equal(final, straight[0])
    assert metrics == straight[1]


def test_the_loss_falls_and_the_rate_follows_its_schedule(tmp_path: Path):
    config = replace(CONFIG, num_steps=30, max_tokens=1000)
    _, metrics = run(tmp_path, config=config)
    assert metrics[0]["train/loss"] > 2.5
    assert metrics[-1]["train/loss"] < 1.0
    rates = [row["train/learning_rate"] for row in metrics]
    assert rates == [0.02 * config.schedule.ratio(step, 30) for step in range(30)]


@pytest.mark.parametrize("max_tokens", [1, 10, 25])
def test_micro_batches_make_the_step_of_one_batch(max_tokens: int):
    examples = random_examples(Random(0), 6, 12, 9, 4)
    results = []
    for limit in (max_tokens, 1000):
        # Without the balance loss, which each micro-batch takes over its own tokens.
        model = tiny_model(router_aux_loss_coef=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        config = SupervisedConfig(
            max_tokens=limit, optimizer=AdamWConfig(learning_rate=0.3, max_grad_norm=1e9)
        )
        metrics = supervised_step(model, optimizer, examples, config, step=0)
        results.append((weights(model), metrics))
    (split, a), (whole, b) = results
    assert float((whole - weights(tiny_model())).norm()) > 0.01
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-7)
    assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6)
    assert a["train/tokens"] == b["train/tokens"] == 27


@pytest.mark.parametrize("name", ["num_steps", "max_tokens", "save_every_steps"])
def test_impossible_numbers_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        replace(CONFIG, **{name: 0})
