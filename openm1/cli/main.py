"""`openm1 COMMAND ...`: finds the command, shows errors as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tyro.extras import subcommand_cli_from_dict

from openm1.cli.commands import COMMANDS, TRAINERS, TYRO_CONFIG, train_stage
from openm1.common.errors import RunStopped

DESCRIPTION = """OpenM1: run, train and measure MiniMax-M1-class reasoning models.

One stage of a training: openm1 drill|pretrain|multiturn|sft|rl RECIPE [--help] [--overrides].
Costs: openm1 plan flops|memory|run|price [--help]."""


def main(argv: Sequence[str] | None = None) -> None:
    """Exit status 0; 2 with the reason on standard error where the input was at fault; 1 where a
    training cannot go on."""
    # Threads that wait for each other in a busy loop lose a core to whatever else is running, and
    # then wait for it: 30 times slower on a machine with one free core of two. torch reads this
    # when it is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args and args[0] in TRAINERS:
            train_stage(args[0], args[1:])
        elif args and args[0] == "plan":
            from openm1.cli import plan

            _run_one_of(plan.PLANS, "openm1 plan", plan.DESCRIPTION, args[1:])
        else:
            _run_one_of(COMMANDS, "openm1", DESCRIPTION, args)
        sys.stdout.flush()
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"openm1: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"openm1: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("openm1: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Who read the output has gone, as `head` does; what is still buffered must not be tried.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run_one_of(
    commands: dict[str, Callable[..., Any]], prog: str, description: str, args: Sequence[str]
) -> None:
    subcommand_cli_from_dict(
        commands,
        prog=prog,
        description=description,
        args=args,
        use_underscores=False,
        config=TYRO_CONFIG,
    )
