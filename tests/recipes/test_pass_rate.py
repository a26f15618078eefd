"""Prompts are chosen by how often the starting model gets them right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openm1.common.errors import RunStopped
from openm1.common.track import read_metrics
from openm1.engine.llm import load_tokenizer
from openm1.envs.base import prompt_text
from openm1.envs.catalog import make_taskset
from openm1.envs.curriculum import CurriculumConfig
from openm1.envs.mixture import Mixture, TaskList
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.pass_rate import MEASURED_FILE, PassRateFilter, keep_learnable
from openm1.recipes.runs import RLRun
from openm1.rl.config import RLConfig

MIXTURE = Mixture([make_taskset("chain"), make_taskset("hop")], seed=3)
# Hot enough that some replies go wrong.
RL = RLConfig(max_response_tokens=24, temperature=2.0)
CONFIG = PassRateFilter(num_prompts=24, num_samples=4)


@pytest.fixture(scope="module")
def nano() -> M1ForCausalLM:
    return M1ForCausalLM.from_pretrained("nano")


def choose(model: M1ForCausalLM, folder: Path, config: PassRateFilter = CONFIG) -> TaskList:
    tokenizer = load_tokenizer("nano")
    assert tokenizer is not None
    return keep_learnable(MIXTURE, config, model, tokenizer, RL, folder)


def prompts(tasks: TaskList) -> list[str]:
    return [prompt_text(task) for _, task in tasks.tasks]


def test_what_lies_strictly_between_is_kept(nano: M1ForCausalLM, tmp_path: Path) -> None:
    tmp_path.joinpath(MEASURED_FILE).write_text(
        "".join(
            json.dumps({"step": i, "pass_rate": rate}) + "\n"
            for i, rate in enumerate([0.0, 0.01, 0.89, 0.9, 1.0])
        )
    )
    kept = choose(nano, tmp_path, PassRateFilter(num_prompts=5))
    assert prompts(kept) == [prompt_text(MIXTURE.task(i)[1]) for i in (1, 2)]


def test_rates_are_measured_once_and_survive_a_kill(nano: M1ForCausalLM, tmp_path: Path) -> None:
    kept = choose(nano, tmp_path)
    lines = read_metrics(tmp_path / MEASURED_FILE)
    rates = {line["step"]: line["pass_rate"] for line in lines}
    assert sorted(rates) == list(range(24)) and len(set(rates.values())) > 1
    assert len(kept.tasks) == sum(0 < rate < 0.9 for rate in rates.values()) > 0
    # Half of them measured, the last line cut short.
    text = "".join(json.dumps(line) + "\n" for line in lines[:12])
    (tmp_path / MEASURED_FILE).write_text(text + '{"step": 1')
    assert prompts(choose(nano, tmp_path)) == prompts(kept)
    assert len(read_metrics(tmp_path / MEASURED_FILE)) == 24
    before = (tmp_path / MEASURED_FILE).read_text()
    choose(nano, tmp_path)
    assert (tmp_path / MEASURED_FILE).read_text() == before


def test_no_prompt_left_ends_the_run(nano: M1ForCausalLM, tmp_path: Path) -> None:
    tmp_path.joinpath(MEASURED_FILE).write_text('{"step": 0, "pass_rate": 1.0}\n')
    with pytest.raises(
        RunStopped, match=r"of 1 prompts none passes between 0\.0 and 0\.9: 0 at or"
    ):
        choose(nano, tmp_path, PassRateFilter(num_prompts=1))


def test_a_list_is_gone_through_again_and_again() -> None:
    tasks = TaskList([MIXTURE.task(i) for i in range(7)], seed=1)
    turns = [[prompt_text(tasks.task(7 * turn + i)[1]) for i in range(7)] for turn in range(3)]
    assert all(sorted(turn) == sorted(prompts(tasks)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    again = TaskList(tasks.tasks, seed=1)
    assert [prompt_text(again.task(7 + i)[1]) for i in range(7)] == turns[1]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= above < below"):
        PassRateFilter(above=0.9, below=0.5)
    with pytest.raises(ValueError, match="num_samples is 0"):
        PassRateFilter(num_samples=0)
    with pytest.raises(ValueError, match="allowed is it or pass_rate"):
        RLRun(
            folder=Path("a"),
            init=Path("b"),
            families={"chain": 1.0},
            rl=RL,
            curriculum=CurriculumConfig(),
            pass_rate=CONFIG,
        )
