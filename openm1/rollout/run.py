"""Task -> prompt -> generate -> parse -> step -> reward, over any `Policy`."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from openm1.chat.reply import parse_reply
from openm1.chat.template import ChatFormat
from openm1.envs.base import GraderError
from openm1.protocols import Env, Policy, Taskset
from openm1.rollout.patience import within
from openm1.types import (
    ErrorSource,
    Message,
    Rollout,
    RolloutGroup,
    SamplingParams,
    Task,
    ToolSpec,
    Turn,
)

MAX_TURNS = 40
"""The report's limit on interaction steps (arXiv 2506.13585, section 6)."""


async def run_group(
    policy: Policy,
    taskset: Taskset,
    task: Task,
    chat_format: ChatFormat,
    params: SamplingParams,
    *,
    seeds: Sequence[int],
    env_timeout_s: float | None = None,
) -> RolloutGroup:
    """One rollout per seed, all at once, so that they can share the prompt's prefill."""
    rollouts = await asyncio.gather(
        *(
            run_rollout(
                policy,
                taskset,
                task,
                chat_format,
                replace(params, seed=seed),
                env_timeout_s=env_timeout_s,
            )
            for seed in seeds
        )
    )
    return RolloutGroup(task=task, rollouts=rollouts)


async def run_rollout(
    policy: Policy,
    taskset: Taskset,
    task: Task,
    chat_format: ChatFormat,
    params: SamplingParams,
    *,
    env_timeout_s: float | None = None,
) -> Rollout:
    """Plays a task to its end. A failure is returned in `Rollout.error`, never raised or scored.

    Each call of the environment may take `env_timeout_s`; None is for ever.
    """
    turns: list[Turn] = []
    source: ErrorSource = "env"
    env: Env | None = None
    try:
        env = taskset.make_env(task)
        messages = await within(env_timeout_s, env.start(), "start of the environment")
        prompt_ids = chat_format.encode(messages, task.tools)
        for number in range(MAX_TURNS):
            source = "policy"
            completion = await policy.generate(prompt_ids, _turn_params(params, number))
            turns.append(Turn(prompt_ids=tuple(prompt_ids), completion=completion))
            source = "env"
            reply = parse_reply(chat_format.tokenizer, completion.token_ids)
            result = await within(env_timeout_s, env.step(reply), "step of the environment")
            if result.done:
                if not math.isfinite(result.reward):
                    raise ValueError(f"the reward is {result.reward}; allowed are finite numbers")
                return Rollout(task=task, turns=tuple(turns), reward=result.reward)
            # Tokens are appended, never rendered again: what was sampled is what is trained on.
            past = [*prompt_ids, *completion.token_ids]
            messages = [*messages, reply]
            prompt_ids = past + _ids_after_reply(
                chat_format, messages, result.messages, past[-1], task.tools
            )
            messages += result.messages
        error = f"not done after {MAX_TURNS} turns"
        return Rollout(task=task, turns=tuple(turns), error=error, error_source="env")
    except Exception as failure:
        if isinstance(failure, GraderError):
            source = "grader"
        text = f"{type(failure).__name__}: {failure}"
        return Rollout(task=task, turns=tuple(turns), error=text, error_source=source)
    finally:
        if env is not None:
            await _close(env, env_timeout_s)


async def _close(env: Env, timeout_s: float | None) -> None:
    """What goes wrong in tidying up does not undo a played task, so it is only told."""
    try:
        await within(timeout_s, env.close(), "close of the environment")
    except Exception:
        logging.getLogger(__name__).exception("an environment failed to close")


def _turn_params(params: SamplingParams, number: int) -> SamplingParams:
    """Each turn draws its own numbers: the same seed would repeat those of the turn before."""
    if params.seed is None or number == 0:
        return params
    return replace(params, seed=Random(f"{params.seed}/{number}").getrandbits(63))


def _ids_after_reply(
    chat_format: ChatFormat,
    before: Sequence[Message],
    new: Sequence[Message],
    last_id: int,
    tools: Sequence[ToolSpec],
) -> list[int]:
    """What follows a reply in the prompt of the next turn: `new`, and the start of another reply.

    `before` ends with the reply and `last_id` is its last token; a reply that was cut short gets
    the end token it lacks. Raises ValueError where the format rewrites the past.
    """
    old, mask = chat_format.encode_with_mask(before, tools)
    whole = chat_format.encode([*before, *new], tools)
    if whole[: len(old)] != old:
        raise ValueError("the chat format changes earlier turns when new messages come")
    end = len(mask) - mask[::-1].index(True)
    return whole[end:] if last_id == old[end - 1] else whole[end - 1 :]
