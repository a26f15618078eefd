"""Public clients with other pins than ours, each in its own environment, against one server.

`python -m tests.clients.run [NAME ...]`. Environments are made once, in .venv/clients.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from tests.server.test_process import process

HERE = Path(__file__).parent
ENVIRONMENTS = Path(".venv/clients")
PYTHON_CLIENTS = {
    "litellm": ("with_litellm.py", ["litellm==1.110.2"]),
    "inspect": ("with_inspect.py", ["inspect-ai==0.3.285", "openai==3.57.0"]),
    "lm_eval": ("with_lm_eval.py", ["lm-eval[api]==0.4.13"]),
}
NPM_OPENAI = "openai@6.49.0"
CLIENT_S = 300


def run_python_client(name: str, address: str) -> None:
    script, packages = PYTHON_CLIENTS[name]
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    if not (folder / ".made").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / ".made").touch()
    subprocess.run([python, HERE / script, address], check=True, timeout=CLIENT_S)


def run_npm_client(address: str) -> None:
    folder = ENVIRONMENTS / "npm"
    if not (folder / ".made").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        install = ["npm", "install", NPM_OPENAI, "--no-audit", "--no-fund", "--silent"]
        subprocess.run(install, cwd=folder, check=True)
        (folder / ".made").touch()
    # Modules are looked for beside the script.
    shutil.copy(HERE / "with_openai.mjs", folder)
    subprocess.run(["node", folder / "with_openai.mjs", address], check=True, timeout=CLIENT_S)


def main(names: list[str]) -> None:
    """Runs the clients named, or all; ends with an error if one fails. npm's needs node."""
    failed = []
    with process("--usage-db", "sqlite://") as (_, address):
        for name in names or [*PYTHON_CLIENTS, "npm"]:
            if name == "npm" and shutil.which("npm") is None:
                sys.exit("npm is missing (on Debian: apt install npm)")
            try:
                if name == "npm":
                    run_npm_client(address)
                else:
                    run_python_client(name, address)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failed.append(f"{name}: {error}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
