"""Threads that wait for each other, in compiled code and asleep."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
from numba import carray

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.blocks import meet
from openm1.kernels.cpu.compile import Job
from openm1.kernels.cpu.team import Team


@Job
def shift(thread, threads, counter, address):
    """Each adds one to what its right-hand neighbour had before the run."""
    values = carray(vector.pointer_i64(address), (threads,))
    found = values[(thread + 1) % threads]
    meet(counter, threads)
    values[thread] = found + 1


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_run_is_done_by_all_threads_once(threads: int) -> None:
    team, values = Team(threads), np.arange(threads) * 1000
    expected = values.copy()
    for run in range(300):
        if run % 100 == 99:
            time.sleep(0.02)  # By now all have gone to sleep.
        team.run(shift, values)
        expected = np.roll(expected, -1) + 1
        assert values.tolist() == expected.tolist()


def test_runs_at_the_moment_of_falling_asleep_are_not_lost() -> None:
    team, values = Team(2), np.zeros(2, np.int64)
    for run in range(200):
        # From well before the others stop watching to well after.
        until = time.perf_counter() + 4e-3 * run / 200
        while time.perf_counter() < until:
            pass
        team.run(shift, values)
    assert values.tolist() == [200, 200]


def test_a_team_that_is_gone_leaves_no_threads() -> None:
    before = set(threading.enumerate())
    team = Team(4)
    team.run(shift, np.zeros(4, np.int64))
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 3
    del team
    gc.collect()
    for helper in helpers:
        helper.join(timeout=5)
        assert not helper.is_alive()


def test_a_team_has_at_least_one_thread() -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        Team(0)
