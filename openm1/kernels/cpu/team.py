"""Threads that run one job together and meet at its barriers.

To wake a thread that sleeps costs a tenth of a millisecond, as much as several layers of a small
model. So after a run the others watch for the next one, in compiled code and without the GIL, for
as long as an engine needs between two tokens; only then do they sleep.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue

import numpy as np

from openm1.kernels.cpu import vector
from openm1.kernels.cpu.blocks import ONE, ZERO, wait_for
from openm1.kernels.cpu.compile import Job, kernel, piece

# One or two milliseconds, on any CPU: a pause takes 20 to 70 ns.
IDLE_PAUSES = np.int64(2**15)

# Words on a team's board, each in a cache line of its own: number of the newest run, its function
# and arguments, arrivals at its barriers, threads done with it, whether thread 0 has begun it; then
# for each thread whether it is awake and the number of the run it did last.
_LINE = 8
NUMBER, FUNCTION, ARGUMENTS, COUNTER, DONE, BEGUN, THREADS = (np.int64(_LINE * i) for i in range(7))


@piece
def word(board, index):
    """Address of a word."""
    return board + 8 * index


@piece
def awake(board, thread):
    return word(board, THREADS + 2 * _LINE * thread)


@piece
def last_run(board, thread):
    return word(board, THREADS + 2 * _LINE * thread + _LINE)


@piece
def run_part(board, thread, num_threads):
    vector.call_job(
        vector.atomic_load(word(board, FUNCTION)),
        thread,
        num_threads,
        word(board, COUNTER),
        vector.atomic_load(word(board, ARGUMENTS)),
    )
    vector.atomic_add(word(board, DONE), ONE)


@kernel
def finish(board, num_threads):
    """Thread 0's part of the run, if that has not begun; returns when all have done theirs."""
    if not vector.atomic_exchange(word(board, BEGUN), ONE):
        run_part(board, ZERO, num_threads)
    wait_for(word(board, DONE), num_threads)


@kernel
def lead(board, num_threads, function, arguments):
    """Begins a run. If all are awake it is done on return; else returns True, and `finish` ends it
    once the others have been roused."""
    vector.atomic_exchange(word(board, FUNCTION), function)
    vector.atomic_exchange(word(board, ARGUMENTS), arguments)
    vector.atomic_exchange(word(board, COUNTER), ZERO)
    vector.atomic_exchange(word(board, DONE), ZERO)
    vector.atomic_exchange(word(board, BEGUN), ZERO)
    # Who goes to sleep says so first and then looks at the number once more; so either that thread
    # sees this run or it is seen asleep here.
    vector.atomic_add(word(board, NUMBER), ONE)
    for thread in range(1, num_threads):
        if not vector.atomic_load(awake(board, thread)):
            return True
    finish(board, num_threads)
    return False


@kernel
def rouse(board, thread):
    """Whether the thread was asleep, and is for the caller to wake."""
    return not vector.atomic_exchange(awake(board, thread), ONE)


@piece
def next_run(board, thread):
    """Watches for a run that this thread has not done; False when it has waited long enough."""
    pauses = ZERO
    while vector.atomic_load(word(board, NUMBER)) == vector.atomic_load(last_run(board, thread)):
        vector.pause()
        pauses += 1
        if vector.HAS_YIELD and pauses % 32 == 0:
            vector.give_up_core()
        if pauses == IDLE_PAUSES:
            return False
    vector.atomic_add(last_run(board, thread), ONE)
    return True


@kernel
def follow(board, thread, num_threads):
    """Takes part in runs until none has come for a while."""
    while True:
        while next_run(board, thread):
            run_part(board, thread, num_threads)
        vector.atomic_exchange(awake(board, thread), ZERO)
        newest = vector.atomic_load(word(board, NUMBER))
        if newest == vector.atomic_load(last_run(board, thread)):
            return
        # A run came in between. If it was roused for it by now, the call is on its way.
        if vector.atomic_exchange(awake(board, thread), ONE):
            return


class Team:
    """`num_threads` threads, the caller's among them. Only one caller at a time."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; allowed is at least 1")
        self.num_threads = num_threads
        self._board = np.zeros(THREADS + 2 * _LINE * num_threads, np.int64)
        self._address = self._board.ctypes.data
        self._calls: list[SimpleQueue[bool]] = [SimpleQueue() for _ in range(num_threads - 1)]
        for index, calls in enumerate(self._calls, start=1):
            args = self._board, index, num_threads, calls
            threading.Thread(target=_work, args=args, daemon=True).start()

    def run(self, job: Job, arguments: np.ndarray) -> None:
        """`arguments` must stay where they are until this returns."""
        function, unfinished = job.address, True
        try:
            unfinished = lead(self._address, self.num_threads, function, arguments.ctypes.data)
        finally:
            # Also after Ctrl-C: no thread may be at work on memory that is about to be freed.
            if unfinished:
                for index, calls in enumerate(self._calls, start=1):
                    if rouse(self._address, index):
                        calls.put(True)
                finish(self._address, self.num_threads)

    def __del__(self) -> None:
        for calls in getattr(self, "_calls", ()):
            calls.put(False)


def _work(board: np.ndarray, index: int, num_threads: int, calls: SimpleQueue[bool]) -> None:
    """Holds the board, not the team, which may go meanwhile."""
    while calls.get():
        follow(board.ctypes.data, index, num_threads)
