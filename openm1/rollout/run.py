"""Task -> prompt -> generate -> parse -> step -> reward, over any `Policy`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from openm1.chat.reply import parse_reply
from openm1.chat.template import ChatFormat
from openm1.envs.base import GraderError
from openm1.protocols import Env, Policy, Taskset
from openm1.types import ErrorSource, Message, Rollout, RolloutGroup, SamplingParams, Task, Turn

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
) -> RolloutGroup:
    """One rollout per seed, all at once, so that they can share the prompt's prefill."""
    rollouts = await asyncio.gather(
        *(
            run_rollout(policy, taskset, task, chat_format, replace(params, seed=seed))
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
) -> Rollout:
    """Plays a task to its end. A failure is returned in `Rollout.error`, never raised or scored."""
    turns: list[Turn] = []
    source: ErrorSource = "env"
    env: Env | None = None
    try:
        env = taskset.make_env(task)
        messages = await env.start()
        prompt_ids = chat_format.encode(messages)
        for number in range(MAX_TURNS):
            source = "policy"
            completion = await policy.generate(prompt_ids, _turn_params(params, number))
            turns.append(Turn(prompt_ids=tuple(prompt_ids), completion=completion))
            source = "env"
            reply = parse_reply(chat_format.tokenizer, completion.token_ids)
            result = await env.step(reply)
            if result.done:
                return Rollout(task=task, turns=tuple(turns), reward=result.reward)
            # Tokens are appended, never rendered again: what was sampled is what is trained on.
            past = [*prompt_ids, *completion.token_ids]
            messages = [*messages, reply]
            prompt_ids = past + _ids_after_reply(chat_format, messages, result.messages, past[-1])
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
            await _close(env)


async def _close(env: Env) -> None:
    """What goes wrong in tidying up does not undo a played task, so it is only told."""
    try:
        await env.close()
    except Exception:
        logging.getLogger(__name__).exception("an environment failed to close")


def _turn_params(params: SamplingParams, number: int) -> SamplingParams:
    """Each turn draws its own numbers: the same seed would repeat those of the turn before."""
    if params.seed is None or number == 0:
        return params
    return replace(params, seed=Random(f"{params.seed}/{number}").getrandbits(63))


def _ids_after_reply(
    chat_format: ChatFormat, before: Sequence[Message], new: Sequence[Message], last_id: int
) -> list[int]:
    """What follows a reply in the prompt of the next turn: `new`, and the start of another reply.

    `before` ends with the reply and `last_id` is its last token; a reply that was cut short gets
    the end token it lacks. Raises ValueError where the format rewrites the past.
    """
    old, mask = chat_format.encode_with_mask(before)
    whole = chat_format.encode([*before, *new])
    if whole[: len(old)] != old:
        raise ValueError("the chat format changes earlier turns when new messages come")
    end = len(mask) - mask[::-1].index(True)
    return whole[end:] if last_id == old[end - 1] else whole[end - 1 :]
