"""How the kernels are compiled, and when what was compiled is still good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def _sources_stamp() -> tuple[tuple[str, float, int], ...]:
    """Changes whenever a file of this folder does."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)


# Sums may be reordered and contracted; infinities and NaN keep their meaning. Division by zero
# gives infinity: a check for it in a loop would keep it from being vectorised.
_OPTIONS = {
    "nogil": True,
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
}


def kernel(function: Callable[..., Any]) -> Any:
    """What Python calls: compiled at the first call, its machine code kept on disk."""
    compiled = njit(cache=True, **_OPTIONS)(function)
    # numba looks at the function's own file only, but the pieces lie in others: what was kept must
    # not outlive a change in any of them.
    compiled._cache._cache_file._source_stamp = _sources_stamp()
    return compiled


def is_on_disk(compiled: Any) -> bool:
    """Whether machine code of a kernel was kept, so that its first call is quick."""
    return bool(compiled._cache._cache_file._load_index())


# A piece of a kernel, called by compiled code only: no wrapper for Python is compiled.
piece = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)
