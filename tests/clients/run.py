"""Public clients with other pins than ours, each in its own environment, against one server.

`python -m tests.clients.run [NAME ...]`. Environments are made once, in .venv/clients.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.server.test_process import process

HERE = Path(__file__).parent
ENVIRONMENTS = Path(".venv/clients")
CLIENT_S = 300


@dataclass(frozen=True, slots=True)
class Client:
    """A script and the packages it needs, from PyPI (.py) or npm (.mjs)."""

    script: str
    packages: tuple[str, ...]


CLIENTS = {
    "litellm": Client("with_litellm.py", ("litellm==1.110.2",)),
    "inspect": Client("with_inspect.py", ("inspect-ai==0.3.285", "openai==3.57.0")),
    "lm_eval": Client("with_lm_eval.py", ("lm-eval[api]==0.4.13",)),
    "langchain": Client("with_langchain.py", ("langchain-openai==1.7.4",)),
    "npm_openai": Client("with_openai.mjs", ("openai@6.49.0",)),
    "npm_ai": Client(
        "with_ai.mjs", ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7")
    ),
}


def make_environment(name: str, client: Client) -> None:
    """Installs what a client needs, unless just that is there."""
    folder = ENVIRONMENTS / name
    made, wanted = folder / ".made", "\n".join(client.packages)
    if made.exists() and made.read_text() == wanted:
        return
    if client.script.endswith(".py"):
        venv.create(folder, with_pip=True, clear=True)
        install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile"]
        subprocess.run([*install, *client.packages], check=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        install = ["npm", "install", *client.packages, "--no-audit", "--no-fund", "--silent"]
        subprocess.run(install, cwd=folder, check=True)
    made.write_text(wanted)


def run_client(name: str, client: Client, address: str) -> None:
    folder = ENVIRONMENTS / name
    command = [folder / "bin" / "python", HERE / client.script]
    if client.script.endswith(".mjs"):
        # Modules are looked for beside the script.
        shutil.copy(HERE / client.script, folder)
        command = ["node", folder / client.script]
    subprocess.run([*command, address], check=True, timeout=CLIENT_S)


def main(names: list[str]) -> None:
    """Runs the clients named, or all; ends with an error if one fails. npm's need node."""
    wanted = {name: CLIENTS[name] for name in names or CLIENTS}
    if shutil.which("npm") is None and any(c.script.endswith(".mjs") for c in wanted.values()):
        sys.exit("npm is missing (on Debian: apt install npm)")
    for name, client in wanted.items():
        make_environment(name, client)
    failed = []
    with process("--usage-db", "sqlite://") as (_, address):
        for name, client in wanted.items():
            try:
                run_client(name, client, address)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failed.append(f"{name}: {error}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
