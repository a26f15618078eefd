"""What every test run shares. Nothing here imports torch: torch-free tests stay quick to start."""

from __future__ import annotations

import os
import random
import sys

import hypothesis
import jaxtyping
import pytest

# Workers side by side must not each take all cores. torch reads these once, when it is imported,
# so this has to come before any test module; processes that a test starts inherit them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MKL_NUM_THREADS"] = "1"

# Every annotated shape and dtype of these packages is checked at each call, tests only. The kernels
# that numba compiles must stay as they are.
jaxtyping.install_import_hook(
    [
        "openm1.kernels.lightning",
        "openm1.kernels.packing",
        "openm1.kernels.paged_attention",
        "openm1.model",
    ],
    "beartype.beartype",
)

# The first call into torch takes long on a busy machine; a deadline would only measure that.
hypothesis.settings.register_profile("openm1", deadline=None)
hypothesis.settings.load_profile("openm1")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Starts each test from the same global random state, whichever tests ran before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
