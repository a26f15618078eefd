from __future__ import annotations

from pathlib import Path

import pytest

from openm1.recipes.runs import SupervisedRun, TraceData, run_supervised
from openm1.train.optim import AdamWConfig
from openm1.train.supervised import SupervisedConfig

from .play import TINY


@pytest.fixture(scope="session")
def guesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers a chain with a random digit: about one in ten is right."""
    run = SupervisedRun(
        folder=tmp_path_factory.mktemp("guesser"),
        shape=TINY,
        data=TraceData(families={"chain": 1.0}, batch_tokens=512, direct_share={"chain": 1.0}),
        train=SupervisedConfig(num_steps=30, optimizer=AdamWConfig(learning_rate=1e-2)),
    )
    return run_supervised(run, "guesser")
