"""What a command needs beyond the core, said before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec

SERVER = ("fastapi", "httptools", "llguidance", "prometheus_client", "sqlalchemy", "uvicorn")


def need_server() -> None:
    """Raises ModuleNotFoundError with the extra to install where the server's parts are missing."""
    missing = [name for name in SERVER if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the server needs {', '.join(missing)}; install with: pip install 'openm1[server]'"
        )
