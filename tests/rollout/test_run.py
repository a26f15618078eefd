from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from openm1.chat.format import ChatFormat, Segment
from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import END_OF_SENTENCE
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.batch import BatchConfig, group_samples
from openm1.rollout.run import MAX_TURNS, run_group, run_rollout
from openm1.types import (
    Completion,
    Message,
    Rollout,
    RolloutGroup,
    SamplingParams,
    StepResult,
    Task,
    ToolCall,
    ToolSpec,
)

TOKENIZER = nano_tokenizer()
EOS = TOKENIZER.special_tokens[END_OF_SENTENCE]
TASK = Task(family="guess", prompt=(Message(role="user", content="guess"),), answer="3")


class ScriptedPolicy:
    """Says what is next in its script: text, or an error to raise."""

    def __init__(self, *script: list[int] | str | Exception) -> None:
        self.script = list(script)
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        self.prompts.append(list(prompt_ids))
        self.params.append(params)
        said = self.script.pop(0)
        if isinstance(said, Exception):
            raise said
        ids = [*TOKENIZER.encode(said, allow_special=True), EOS] if isinstance(said, str) else said
        return Completion(token_ids=tuple(ids), logprobs=(-1.0,) * len(ids))


class GuessEnv:
    """Says "no" until it hears the answer. `trouble` names the method that raises."""

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble
        self.heard: list[Message] = []
        self.num_closed = 0

    async def start(self) -> list[Message]:
        self.check("start")
        return list(TASK.prompt)

    async def step(self, reply: Message) -> StepResult:
        self.check("step")
        self.heard.append(reply)
        if reply.content == TASK.answer:
            return StepResult(reward=0.25)
        messages = (Message(role="user", content=f"no {len(self.heard)}"),)
        return StepResult(reward=0.0, done=False, messages=messages)

    async def close(self) -> None:
        self.num_closed += 1
        self.check("close")

    def check(self, method: str) -> None:
        if method == self.trouble:
            raise OSError(f"{method} is broken")


class Guess:
    """A taskset of one task, whose environments can be looked at afterwards."""

    name = "guess"

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble
        self.envs: list[GuessEnv] = []

    def make_env(self, task: Task) -> GuessEnv:
        assert task is TASK
        if self.trouble == "make_env":
            raise OSError("make_env is broken")
        self.envs.append(GuessEnv(self.trouble))
        return self.envs[-1]


def play(policy: ScriptedPolicy, taskset: Guess, chat_format: ChatFormat | None = None) -> Rollout:
    chat_format = chat_format or chat_format_for(TOKENIZER)
    params = SamplingParams(seed=11)
    return asyncio.run(run_rollout(policy, taskset, TASK, chat_format, params))  # pyright: ignore


def test_a_task_is_played_to_its_reward():
    policy, taskset = ScriptedPolicy("<think>hm</think>3"), Guess()
    rollout = play(policy, taskset)
    assert (rollout.reward, rollout.error, len(rollout.turns)) == (0.25, None, 1)
    assert taskset.envs[0].heard == [Message(role="assistant", reasoning="hm", content="3")]
    assert rollout.turns[0].prompt_ids == tuple(chat_format_for(TOKENIZER).encode(TASK.prompt))
    assert taskset.envs[0].num_closed == 1


def test_turns_grow_by_the_very_tokens_that_were_sampled():
    # " =3" is one token of the vocabulary: spelled in characters, it reads the same and rendering
    # it again would give the one token.
    odd = [ord(" "), ord("="), ord("3"), EOS]
    assert TOKENIZER.encode(" =3") != odd[:-1]
    policy, taskset = ScriptedPolicy(odd, "2", "3"), Guess()
    rollout = play(policy, taskset)
    assert [message.content for message in taskset.envs[0].heard] == [" =3", "2", "3"]
    for before, after in zip(rollout.turns, rollout.turns[1:], strict=False):
        past = before.prompt_ids + before.completion.token_ids
        assert after.prompt_ids[: len(past)] == past
    group = RolloutGroup(task=TASK, rollouts=[rollout, play(ScriptedPolicy("3"), Guess())])
    (sample, _) = group_samples(group, 0, BatchConfig(), window_tokens=1000)
    learned = [t for t, flag in zip(sample.token_ids, sample.loss_mask, strict=True) if flag]
    assert learned == [*odd, ord("2"), EOS, ord("3"), EOS]


def test_a_prompt_of_many_turns_is_the_rendered_conversation():
    # Where a reply is tokenized as the tokenizer would, growing must not differ from rendering.
    policy = ScriptedPolicy("<think>4 +3</think>1", "2", "3")
    play(policy, Guess())
    conversation = [
        *TASK.prompt,
        Message(role="assistant", reasoning="4 +3", content="1"),
        Message(role="user", content="no 1"),
        Message(role="assistant", content="2"),
        Message(role="user", content="no 2"),
    ]
    assert policy.prompts[2] == chat_format_for(TOKENIZER).encode(conversation)


def test_a_reply_that_was_cut_gets_the_end_it_lacks_but_does_not_learn_it():
    policy, taskset = ScriptedPolicy([ord("1"), ord("2")], "3"), Guess()
    rollout = play(policy, taskset)
    conversation = [
        *TASK.prompt,
        Message(role="assistant", content="12"),
        Message(role="user", content="no 1"),
    ]
    assert policy.prompts[1] == chat_format_for(TOKENIZER).encode(conversation)
    assert rollout.turns[0].completion.token_ids == (ord("1"), ord("2"))


def test_each_turn_draws_its_own_numbers():
    first, second = ScriptedPolicy("1", "2", "3"), ScriptedPolicy("1", "2", "3")
    play(first, Guess())
    play(second, Guess())
    seeds = [params.seed for params in first.params]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    assert first.params == second.params


@pytest.mark.parametrize("trouble", ["make_env", "start", "step"])
def test_trouble_of_the_environment_is_told_as_such(trouble: str):
    taskset = Guess(trouble)
    rollout = play(ScriptedPolicy("1"), taskset)
    assert rollout.error == f"OSError: {trouble} is broken"
    assert (rollout.error_source, rollout.reward) == ("env", None)
    assert [env.num_closed for env in taskset.envs] == ([] if trouble == "make_env" else [1])


def test_trouble_of_the_policy_is_told_as_such_and_keeps_the_turns_before():
    taskset = Guess()
    rollout = play(ScriptedPolicy("1", ConnectionError("gone")), taskset)
    assert rollout.error == "ConnectionError: gone"
    assert (rollout.error_source, rollout.reward, len(rollout.turns)) == ("policy", None, 1)
    assert taskset.envs[0].num_closed == 1


def test_trouble_in_closing_takes_no_reward_away():
    taskset = Guess("close")
    rollout = play(ScriptedPolicy("3"), taskset)
    assert (rollout.reward, rollout.error) == (0.25, None)
    assert taskset.envs[0].num_closed == 1


def test_a_task_that_does_not_end_is_ended():
    taskset = Guess()
    rollout = play(ScriptedPolicy(*["1"] * MAX_TURNS), taskset)
    assert rollout.error == f"not done after {MAX_TURNS} turns"
    assert (rollout.reward, len(rollout.turns)) == (None, MAX_TURNS)
    assert taskset.envs[0].num_closed == 1


ADD = ToolSpec(name="add", description="a + b", parameters={"type": "object"})
SUM_TASK = Task(
    family="sum", prompt=(Message(role="user", content="17 +25"),), answer="42", tools=(ADD,)
)


class SumEnv:
    """Carries out calls of `add`, two at once if asked, until an answer comes without a call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    async def start(self) -> list[Message]:
        return list(SUM_TASK.prompt)

    async def step(self, reply: Message) -> StepResult:
        if not reply.tool_calls:
            return StepResult(reward=float(reply.content == SUM_TASK.answer))
        results = []
        for call in reply.tool_calls:
            self.calls.append((call.name, call.arguments))
            total = sum(json.loads(call.arguments).values())
            results.append(
                Message(role="tool", name=call.name, tool_call_id=call.id, content=str(total))
            )
        return StepResult(reward=0.0, done=False, messages=tuple(results))

    async def close(self) -> None:
        pass


class Sums:
    name = "sum"

    def __init__(self) -> None:
        self.env = SumEnv()

    def make_env(self, task: Task) -> SumEnv:
        return self.env


def test_tools_are_offered_called_and_answered_and_only_what_was_written_is_learned():
    # A call as no renderer would write it: blanks, and characters that could be longer tokens.
    block = '<tool_calls>\n{"name":  "add", "arguments": {"a": 17,"b":25}}\n</tool_calls>'
    odd = [*(ord(c) for c in f"so: {block}"), EOS]
    policy, taskset = ScriptedPolicy(odd, "<think>42 it is</think>42"), Sums()
    chat_format = chat_format_for(TOKENIZER)
    rollout = asyncio.run(
        run_rollout(policy, taskset, SUM_TASK, chat_format, SamplingParams(seed=1))  # pyright: ignore
    )
    assert (rollout.reward, rollout.error) == (1.0, None)
    assert taskset.env.calls == [("add", '{"a": 17, "b": 25}')]
    first, second = rollout.turns
    assert first.prompt_ids == tuple(chat_format.encode(SUM_TASK.prompt, [ADD]))
    assert "add" in TOKENIZER.decode(first.prompt_ids)
    # The call stands in the next prompt as it was sampled, though rendered it would read otherwise.
    past = first.prompt_ids + first.completion.token_ids
    assert second.prompt_ids[: len(past)] == past
    call = ToolCall(name="add", arguments='{"a": 17, "b": 25}', id="call_0")
    told = [
        *SUM_TASK.prompt,
        Message(role="assistant", content="so:", tool_calls=(call,)),
        Message(role="tool", name="add", tool_call_id="call_0", content="42"),
    ]
    rendered = tuple(chat_format.encode(told, [ADD]))
    assert rendered[: len(past)] != past
    answered = second.prompt_ids[len(past) :]
    assert "42" in TOKENIZER.decode(answered)
    assert rendered[-len(answered) :] == answered
    (sample, _) = group_samples(
        RolloutGroup(task=SUM_TASK, rollouts=[rollout, replace(rollout, reward=0.0)]),
        0,
        BatchConfig(),
        window_tokens=1000,
    )
    learned = [t for t, flag in zip(sample.token_ids, sample.loss_mask, strict=True) if flag]
    assert learned == [*odd, *second.completion.token_ids]


class Forgetful(ChatFormat):
    """Leaves a reply's text out once it is answered, as some templates do with thoughts."""

    def segments(
        self,
        messages: Sequence[Message],
        tools: Sequence[object],
        add_generation_prompt: bool,
        *,
        need_mask: bool = False,
    ) -> list[Segment]:
        segments = []
        for i, message in enumerate(messages):
            mine = message.role == "assistant"
            text = "" if mine and i + 1 < len(messages) else message.content
            segments += [Segment(text + "x", None, mine), Segment(END_OF_SENTENCE, EOS, mine)]
        return segments


def test_a_format_that_rewrites_the_past_is_an_error_and_no_wrong_prompt():
    rollout = play(ScriptedPolicy("1", "3"), Guess(), Forgetful(TOKENIZER))
    assert rollout.error is not None
    assert "changes earlier turns" in rollout.error
    assert len(rollout.turns) == 1


class Cancelled(ScriptedPolicy):
    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        raise asyncio.CancelledError


def test_cancelling_is_no_failed_rollout_and_still_closes():
    taskset = Guess()
    with pytest.raises(asyncio.CancelledError):
        play(Cancelled(), taskset)
    assert taskset.envs[0].num_closed == 1


def test_a_group_plays_one_task_once_per_seed_and_keeps_what_failed():
    policy, taskset = ScriptedPolicy("3", ConnectionError("gone"), "3"), Guess()
    group = asyncio.run(
        run_group(
            policy,
            taskset,  # pyright: ignore[reportArgumentType]
            TASK,
            chat_format_for(TOKENIZER),
            SamplingParams(temperature=0.5, seed=0),
            seeds=[5, 6, 7],
        )
    )
    assert [params.seed for params in policy.params] == [5, 6, 7]
    assert {params.temperature for params in policy.params} == {0.5}
    assert [rollout.reward for rollout in group.rollouts] == [0.25, None, 0.25]
    assert len(taskset.envs) == 3
