"""How the kernels are compiled, and when what was compiled is still good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.core.ccallback import CFunc


def _sources_stamp() -> tuple[tuple[str, float, int], ...]:
    """Changes whenever a file in this folder does."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)


# Sums may be reordered and contracted; infinities and NaN keep their meaning. Division by zero
# gives infinity: a check for it in a loop would keep it from being vectorised.
_OPTIONS = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}


def kernel(function: Callable[..., Any]) -> Any:
    """What Python calls: compiled at the first call, its machine code kept on disk."""
    compiled = njit(cache=True, nogil=True, **_OPTIONS)(function)
    _keep_while_fresh(compiled)
    return compiled


def _keep_while_fresh(compiled: Any) -> None:
    # numba looks at the function's own file only, but the pieces lie in others: what was kept must
    # not outlive a change in any of them.
    kept = compiled._cache._cache_file
    kept._source_stamp = kept._source_stamp, _sources_stamp()


class Job:
    """What a `Team` runs: job(thread, num_threads, counter, arguments), all int64.

    `counter` is the address of a zero that its barriers count up, `arguments` that of whatever the
    job reads. It must not raise. Compiled when first asked for its address; kept on disk.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._compiled = CFunc(function, ((types.int64,) * 4, types.void), {}, dict(_OPTIONS))
        self._compiled.enable_caching()
        _keep_while_fresh(self._compiled)
        self._address: int | None = None

    @property
    def address(self) -> int:
        if self._address is None:
            self._compiled.compile()
            self._address = self._compiled.address
        assert self._address is not None
        return self._address

    @property
    def is_on_disk(self) -> bool:
        """Whether machine code was kept, so that the first run is quick."""
        return bool(self._compiled._cache._cache_file._load_index())  # pyright: ignore


# A piece of a kernel, called by compiled code only: no wrapper for Python is compiled.
piece = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)
