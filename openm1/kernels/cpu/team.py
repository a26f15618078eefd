"""Threads that run one compiled function together and meet at its barriers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np


class Team:
    """`num_threads` threads, the caller's among them; the others sleep between runs.

    A function is called as `function(thread, num_threads, counter, *args)` in each. It must release
    the GIL and must not raise: `counter` is the address of a zero that its barriers count up.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; allowed is at least 1")
        self.num_threads = num_threads
        self._counter = np.zeros(1, np.int64)
        self._jobs = [SimpleQueue() for _ in range(num_threads - 1)]
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        for index, jobs in enumerate(self._jobs, start=1):
            work = threading.Thread(target=_work, args=(index, jobs, self._done), daemon=True)
            work.start()

    def run(self, function: Callable[..., object], *args: object) -> None:
        self._counter[0] = 0
        call = (function, (self.num_threads, self._counter.ctypes.data, *args))
        for jobs in self._jobs:
            jobs.put(call)
        try:
            function(0, *call[1])
        finally:
            # Ctrl-C must not leave a thread at work on memory that is about to be freed.
            errors = [self._done.get() for _ in self._jobs]
        for error in errors:
            if error is not None:
                raise error

    def __del__(self) -> None:
        for jobs in getattr(self, "_jobs", ()):
            jobs.put(None)


def _work(index: int, jobs: SimpleQueue, done: SimpleQueue[BaseException | None]) -> None:
    while (job := jobs.get()) is not None:
        function, args = job
        try:
            function(index, *args)
            done.put(None)
        except BaseException as error:
            done.put(error)
        # A reference kept while waiting would keep the team, and so this thread, alive.
        del job, function, args
