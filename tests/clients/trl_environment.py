"""TRL in an environment of its own, above this one, so that both have one torch.

`python -m tests.clients.trl_environment` makes it where it is not yet and prints its interpreter.
"""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

from tests.clients.run import ENVIRONMENTS

PACKAGES = ["trl==1.16.0"]


def interpreter() -> Path:
    folder = ENVIRONMENTS / "trl"
    python = folder / "bin" / "python"
    if not (folder / ".made").exists():
        venv.create(folder, with_pip=True, clear=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "above.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        (folder / ".made").touch()
    return python


if __name__ == "__main__":
    print(interpreter())
