"""Task -> prompt -> generate -> parse -> step -> reward, over any `Policy`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from openm1.chat.reply import parse_reply
from openm1.chat.template import ChatFormat
from openm1.protocols import Policy, Taskset
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
    env = taskset.make_env(task)
    turns: list[Turn] = []
    source: ErrorSource = "env"
    try:
        messages = await env.start()
        prompt_ids = chat_format.encode(messages)
        for _ in range(MAX_TURNS):
            source = "policy"
            completion = await policy.generate(prompt_ids, params)
            turns.append(Turn(prompt_ids=tuple(prompt_ids), completion=completion))
            source = "env"
            reply = parse_reply(chat_format.tokenizer, completion.token_ids)
            result = await env.step(reply)
            if result.done:
                return Rollout(task=task, turns=tuple(turns), reward=result.reward)
            # Tokens are appended, never rendered again: what was sampled is what is trained on.
            grown = [*messages, reply]
            prompt_ids = [
                *prompt_ids,
                *completion.token_ids,
                *_new_ids(chat_format, grown, list(result.messages)),
            ]
            messages = [*grown, *result.messages]
        error = f"not done after {MAX_TURNS} turns"
        return Rollout(task=task, turns=tuple(turns), error=error, error_source="env")
    except Exception as failure:
        text = f"{type(failure).__name__}: {failure}"
        return Rollout(task=task, turns=tuple(turns), error=text, error_source=source)
    finally:
        await env.close()


def _new_ids(chat_format: ChatFormat, before: list[Message], new: list[Message]) -> list[int]:
    """The tokens `new` and the next generation prompt add to a conversation."""
    old = chat_format.encode(before, add_generation_prompt=False)
    return chat_format.encode([*before, *new], add_generation_prompt=True)[len(old) :]
