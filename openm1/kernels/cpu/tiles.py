"""Whether this process may use the tile unit (AMX) for bf16 products."""

from __future__ import annotations

import ctypes
import platform
import sys

from openm1.kernels.cpu.vector import HAS_TILES

# Linux gives the tile registers to a process that asks for them (arch_prctl, since 5.16).
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def tiles_available() -> bool:
    if not HAS_TILES or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
