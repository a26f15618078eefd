"""The harness of the comparison, on a task that is played and learned in seconds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cispo import sweep as sweeping
from benchmarks.cispo.arms import ARMS, GRID, RATES, SymmetricMask
from benchmarks.cispo.cold_start import ColdStart, fork_targets, train_cold_start, written_rows
from benchmarks.cispo.lockstep import (
    FORK,
    TURN_TOKENS,
    VALUE,
    Words,
    draw_chains,
    pack_rows,
    play_chains,
)
from benchmarks.cispo.measure import RareTokens, group_advantages
from benchmarks.cispo.report import (
    draw_comparison,
    draw_mechanism,
    figure2,
    growth,
    mechanism_table,
    rates_table,
    steps_to,
    thresholds_table,
)
from benchmarks.cispo.run import Curriculum, RunPlan, run
from benchmarks.cispo.sweep import Job, read_results, sweep
from benchmarks.cispo.tasks import CompareTask, model_config
from openm1.envs.recheck import RecheckConfig, RecheckTaskset
from openm1.model.m1 import M1ForCausalLM
from openm1.rl.advantage import group_advantages as group_advantages_of_a_list
from openm1.rl.losses import CISPO
from openm1.train.loss import score_tokens

# Decode and prefill round differently: fp32 over two layers.
SAMPLER_ROUNDING = 1e-4

SMALL = CompareTask(
    about="small",
    recheck=RecheckConfig(
        num_symbols=4, operations_per_kind=2, num_kinds=2, min_turns=1, max_turns=3, hint_right=0.4
    ),
    cold_start=ColdStart(num_steps=60, rows=32, recheck_probability=0.2, learning_rate=1e-2),
    num_steps=2,
)


@pytest.fixture(scope="module")
def words() -> Words:
    return SMALL.words()


@pytest.fixture(scope="module")
def start(words: Words) -> M1ForCausalLM:
    model = M1ForCausalLM(model_config(words), seed=0)
    train_cold_start(model, words, SMALL.lengths, SMALL.cold_start)
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_tables_are_the_environments(words):
    taskset = RecheckTaskset(SMALL.recheck)
    for number, operation in enumerate(SMALL.recheck.operations):
        for symbol, letter in enumerate(SMALL.recheck.symbols):
            expected = SMALL.recheck.symbols.index(taskset.apply(operation, letter))
            assert int(words.tables[number, symbol]) == expected
        mark = int(words.recheck(torch.tensor(number)))
        assert words.text[mark] == SMALL.recheck.recheck(operation)


def test_rows_are_played_by_the_rules(words, start):
    chains = draw_chains(words, (1, 3), 8, 4, generator())
    play = play_chains(start, words, chains, generator(1))
    assert chains.num_turns.tolist() == sorted(chains.num_turns.tolist(), reverse=True)
    checks = 0
    for row, tokens in enumerate(play.tokens.tolist()):
        value, right = tokens[0], []
        for turn in range(int(chains.num_turns[row])):
            column = 1 + TURN_TOKENS * turn
            operation, hint, fork, written = tokens[column : column + TURN_TOKENS]
            number = operation - words.first_operation
            assert number == int(chains.operations[row, turn])
            checked = fork == int(words.recheck(torch.tensor(number)))
            assert bool(play.chosen[row, column + FORK])
            assert bool(play.chosen[row, column + VALUE]) == checked
            assert checked or written == hint
            checks += checked
            # After a value that is no symbol there is no right one.
            known = min(value, words.num_symbols - 1)
            right.append(written == int(words.tables[number, known]))
            value = written
        assert float(play.reward[row]) == float(all(right))
        assert not bool(play.chosen[row, 1 + TURN_TOKENS * int(chains.num_turns[row]) :].any())
    assert checks > 0


def test_the_sampler_and_the_trainer_agree(words, start):
    chains = draw_chains(words, (1, 3), 8, 2, generator())
    play = play_chains(start, words, chains, generator(1))
    batch = pack_rows(play.tokens, play.chosen, chains.num_turns)
    with torch.no_grad():
        scores = score_tokens(start, batch, vocab_size=len(words.text))
    assert float((scores.logprobs - play.logprobs[play.chosen]).abs().max()) < SAMPLER_ROUNDING


def test_half_of_the_written_forks_check_and_the_planted_share_is_learned(words, start):
    chains = draw_chains(words, (3, 3), 400, 1, generator())
    tokens = written_rows(words, chains, generator(1))
    forks = tokens[:, 1 + FORK :: TURN_TOKENS]
    share = float((forks == words.recheck(chains.operations)).double().mean())
    assert 0.5 < share < 0.6
    targets = fork_targets(words, chains.operations[:, 0], SMALL.cold_start)
    assert torch.allclose(targets.sum(1), torch.ones(400))
    marks = words.recheck(chains.operations[:, 0])
    assert bool((targets.gather(1, marks[:, None]) == 0.2).all())
    play = play_chains(start, words, chains, generator(2))
    assert float(play.recheck_probability.mean()) == pytest.approx(0.2, abs=0.05)


def test_a_level_draws_half_of_its_operations_from_its_newest_kind(words):
    chains = draw_chains(words, (3, 3), 2000, 1, generator(), kinds=2)
    newest = (chains.operations >= SMALL.recheck.operations_per_kind).double().mean()
    # Half, and half of the other half.
    assert float(newest) == pytest.approx(0.75, abs=0.02)
    first = draw_chains(words, (3, 3), 100, 1, generator(), kinds=1)
    assert int(first.operations.max()) < SMALL.recheck.operations_per_kind


def test_advantages_are_those_of_the_framework():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    expected = [a for rows in reward.split(3) for a in group_advantages_of_a_list(rows.tolist())]
    assert group_advantages(reward, group).tolist() == pytest.approx(expected)


def test_rare_tokens_are_counted_by_sign():
    rare = RareTokens()
    rare.add(
        ratio=torch.tensor([2.0, 2.0, 0.5, 9.0]),
        weights=torch.tensor([0.0, 2.0, 0.5, 9.0]),
        advantages=torch.tensor([1.0, -1.0, 3.0, 1.0]),
        rare=torch.tensor([True, True, True, False]),
    )
    metrics = rare.metrics()
    assert (metrics["up"], metrics["down"]) == (1.5, 2.0)
    assert metrics["net"] == pytest.approx(-0.5 / 3.5)
    assert metrics["net_whole"] == pytest.approx(1.5 / 5.5)
    assert (metrics["up_dropped"], metrics["down_dropped"]) == (0.5, 0.0)


def test_the_symmetric_mask_looks_at_no_sign():
    ratio = torch.tensor([0.7, 0.9, 1.2, 1.3])
    for sign in (1.0, -1.0):
        weights = SymmetricMask().token_weights(ratio, torch.full_like(ratio, sign))
        assert weights.tolist() == pytest.approx([0.0, 0.9, 1.2, 0.0])


@pytest.mark.slow
def test_a_run_repeats_itself_and_makes_the_rare_mark_common(words, start, tmp_path):
    plan = RunPlan(
        loss=CISPO(), learning_rate=2e-3, seed=0, num_updates=4, num_steps=8, num_prompts=8,
        group_size=8, lengths=(1, 3),
    )  # fmt: skip
    start.save_pretrained(tmp_path)
    one, two = (
        run(M1ForCausalLM.from_pretrained(tmp_path), words, plan)["curves"] for _ in range(2)
    )
    assert one == two
    assert one["recheck"][-1] > 2 * one["recheck"][0]
    assert one["reward"][-1] > one["reward"][0]


def test_a_level_that_is_passed_makes_room_for_the_next(words, start, tmp_path):
    curriculum = Curriculum(lengths=((1, 1), (1, 2)), kinds=(1, 2), passed=0.0)
    plan = RunPlan(
        loss=CISPO(), learning_rate=1e-5, seed=0, num_updates=1, num_steps=3, num_prompts=4,
        group_size=4, curriculum=curriculum,
    )  # fmt: skip
    start.save_pretrained(tmp_path)
    curves = run(M1ForCausalLM.from_pretrained(tmp_path), words, plan)["curves"]
    assert curves["level"] == [0, 1, 1]


@pytest.mark.slow
def test_a_sweep_runs_only_what_is_missing(tmp_path: Path, monkeypatch, capsys):
    small = replace(SMALL, cold_start=replace(SMALL.cold_start, num_steps=2), num_steps=1)
    monkeypatch.setitem(sweeping.TASKS, "small", small)
    jobs = [Job(task="small", arm=arm, learning_rate=1e-4, seed=0) for arm in ("cispo", "dapo")]
    sweep(jobs[:1], tmp_path, 1)
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text() + '{"task": "small", "arm"')
    both = sweep(jobs, tmp_path, 1)
    assert [line["arm"] for line in both] == ["cispo", "dapo"]
    assert len(read_results(results)) == 2
    assert "1/1 small dapo" in capsys.readouterr().out


def curves_of(*rewards: float) -> dict[str, list[float]]:
    count = len(rewards)
    return {
        "reward": list(rewards), "level": [0.0] * count, "recheck": [0.03, 0.06, 0.6][:count],
        "rare_net": [0.2, 0.4, 0.9][:count], "rare_up_dropped": [0.0] * count,
        "rare_down_dropped": [0.0] * count, "clipped": [0.0] * count, "fork_entropy": [0.1] * count,
    }  # fmt: skip


def test_figures_are_read_off_curves(tmp_path: Path):
    assert steps_to([0.2, 0.4, 0.9], 0.65) == 1.5
    assert steps_to([0.9], 0.8) == 0.0
    assert steps_to([0.2, 0.4], 0.8) == math.inf
    runs = [
        {"arm": arm, "learning_rate": 1e-4, "curves": curves_of(0.2, 0.4, 0.9)}
        for arm in ("cispo", "dapo")
    ]
    assert growth(runs[0]) == pytest.approx([2.0, 10.0])
    assert "| 1.8 (1.8-1.8) | never |" in thresholds_table(runs, (0.8, 0.95))
    assert "| 30 % |" in mechanism_table(runs)
    assert "0.50" in rates_table(runs)
    draw_comparison({"recheck": runs}, tmp_path / "comparison.png")
    draw_mechanism(runs, tmp_path / "mechanism.png")
    assert all((tmp_path / f"{name}.png").stat().st_size for name in ("comparison", "mechanism"))


def test_the_reports_figure_has_all_three_curves():
    points = figure2()
    assert {name: len(points[name]) for name in points} == {"grpo": 24, "dapo": 24, "cispo": 23}
    assert max(y for _, y in points["cispo"]) > max(y for _, y in points["dapo"])


def test_every_arm_that_is_compared_has_a_rate_of_its_grid():
    for task, rates in RATES.items():
        for arm, rate in rates.items():
            assert rate in GRID[task][ARMS[arm].num_updates]
