"""How replies begin, think, go on and end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openm1.types import SamplingParams

from .tiny import (
    CLOSE,
    EOS,
    FP64_ERROR,
    OPEN,
    TOKENS,
    VOCAB,
    alone,
    assert_same,
    complete,
    engine_for,
    hybrid_model,
    random_prompts,
)


def test_finish_reasons() -> None:
    model = hybrid_model(torch.float64)
    prompt = random_prompts((12,))[0]
    free = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    (whole,) = complete(engine_for(model), [prompt], [free])
    assert whole.finish_reason == "length" and len(whole.token_ids) == 20
    assert whole.num_prompt_tokens == 12 and whole.forced == (False,) * 20
    stop_at = whole.token_ids[6]
    first = whole.token_ids.index(stop_at) + 1
    params = SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=(stop_at,))
    (cut,) = complete(engine_for(model), [prompt], [params])
    assert cut.finish_reason == "stop" and cut.token_ids == whole.token_ids[:first]


def test_the_end_of_sentence_ends_unless_it_is_ignored() -> None:
    model = hybrid_model()
    prompt = random_prompts((4,))[0]
    params = [SamplingParams(max_tokens=40, seed=seed) for seed in range(12)]
    runs = complete(engine_for(model), [prompt] * 12, params)
    ended = [(s, c) for s, c in enumerate(runs) if c.finish_reason == "stop"]
    assert ended and all(c.token_ids.index(EOS) == len(c.token_ids) - 1 for _, c in ended)
    assert all(EOS not in c.token_ids for c in runs if c.finish_reason == "length")
    seed, stopped = ended[0]
    ignoring = SamplingParams(max_tokens=40, seed=seed, ignore_eos=True)
    (longer,) = complete(engine_for(model), [prompt], [ignoring])
    assert len(longer.token_ids) == 40
    assert longer.token_ids[: len(stopped.token_ids)] == stopped.token_ids


@pytest.mark.parametrize("budget", [0, 1, 6])
def test_a_thinking_budget_closes_the_thought(budget: int) -> None:
    """The prompt opens the thought; in a random model it would hardly ever close by itself."""
    model = hybrid_model(torch.float64)
    prompt = [*random_prompts((10,))[0], OPEN]
    params = SamplingParams(max_tokens=12, seed=2, ignore_eos=True, thinking_budget=budget)
    (free,) = complete(engine_for(model), [prompt], [SamplingParams(max_tokens=12, seed=2)])
    (cut,) = complete(engine_for(model), [prompt], [params])
    assert cut.token_ids[:budget] == free.token_ids[:budget]
    assert cut.token_ids[budget] == CLOSE
    assert cut.forced == tuple(i == budget for i in range(12))
    assert cut.num_reasoning_tokens == budget
    # The forced token was read by the model: what follows is what it says after it.
    ids = torch.tensor([[*prompt, *cut.token_ids]])
    logprobs = model(ids)[0, len(prompt) - 1 : -1, :VOCAB].log_softmax(-1)
    oracle = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
    assert cut.logprobs == pytest.approx(oracle, abs=FP64_ERROR)


def test_a_budget_of_one_request_is_not_its_neighbours() -> None:
    model = hybrid_model(torch.float64)
    prompts = [[*p, OPEN] for p in random_prompts((10, 20, 30))]
    params = [SamplingParams(max_tokens=8, seed=1, thinking_budget=b) for b in (2, None, 4)]
    assert_same(
        complete(engine_for(model), prompts, params), alone(model, prompts, params), FP64_ERROR
    )


def test_thoughts_of_earlier_turns_do_not_count() -> None:
    model = hybrid_model()
    params = SamplingParams(max_tokens=6, seed=2, ignore_eos=True, thinking_budget=0)
    for tail, is_open in ([(EOS, 20), False], [(20,), True]):
        (done,) = complete(engine_for(model), [[20, OPEN, 21, *tail]], [params])
        assert (done.token_ids[0] == CLOSE and done.forced[0]) == is_open


@pytest.mark.parametrize("sampled", [True, False])
def test_ids_above_the_tokenizer_are_never_sampled(sampled: bool) -> None:
    model = hybrid_model()
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 10 * model.lm_head.weight[: 96 - VOCAB]
    params = SamplingParams(max_tokens=60, temperature=5.0 * sampled, seed=0, ignore_eos=True)
    (completion,) = complete(engine_for(model), [[20]], [params])
    assert max(completion.token_ids) < VOCAB
    assert all(-50 < x <= 0 for x in completion.logprobs)


def test_a_request_without_a_seed_is_drawn_afresh() -> None:
    engine = engine_for(hybrid_model())
    outputs = complete(engine, [[20]] * 4, [SamplingParams(max_tokens=20)] * 4)
    assert len({c.token_ids for c in outputs}) > 1


def test_whole_numbers_are_fine_as_temperature_and_top_p() -> None:
    model = hybrid_model(torch.float64)
    whole = SamplingParams(max_tokens=5, temperature=1, top_p=1, seed=3)
    (mine,) = complete(engine_for(model), [[20]], [whole])
    (other,) = complete(engine_for(model), [[20]], [SamplingParams(max_tokens=5, seed=3)])
    assert mine == other


def test_the_likeliest_tokens_are_reported_where_asked_for() -> None:
    model = hybrid_model(torch.float64)
    prompts = random_prompts((9, 12))
    params = [SamplingParams(max_tokens=4, seed=1, top_logprobs=k) for k in (3, 0)]
    asked, silent = complete(engine_for(model), prompts, params)
    assert silent.top_logprobs == ()
    ids = torch.tensor([[*prompts[0], *asked.token_ids]])
    logprobs = model(ids)[0, 8:-1, :VOCAB].log_softmax(-1).topk(3)
    assert [[t for t, _ in top] for top in asked.top_logprobs] == logprobs.indices.tolist()


def test_bans_act_on_the_answer() -> None:
    model = hybrid_model()
    free = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompt = random_prompts((9,))[0]
    (reply,) = complete(engine_for(model), [prompt], [free])
    banned = SamplingParams(
        max_tokens=8, temperature=0.0, ignore_eos=True, banned_token_ids=reply.token_ids[:2]
    )
    (other,) = complete(engine_for(model), [prompt], [banned])
    assert not set(other.token_ids) & set(reply.token_ids[:2])
    with pytest.raises(ValueError):
        engine_for(model).submit(prompt, SamplingParams(banned_token_ids=(VOCAB,)))


def test_a_reply_that_is_sure_of_itself_for_long_is_stopped() -> None:
    model = hybrid_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000.0)
    params = SamplingParams(max_tokens=50, seed=0, ignore_eos=True, repetition_stop_tokens=5)
    (reply,) = complete(engine_for(model), [[20, 21]], [params])
    assert reply.finish_reason == "repetition" and len(reply.token_ids) < 50
    assert all(logprob > -0.02 for logprob in reply.logprobs[-5:])


def test_a_thought_lands_softly_at_the_end_of_a_sentence() -> None:
    model = hybrid_model(torch.float64)
    prompt = [*random_prompts((10,))[0], OPEN]
    free = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    (thought,) = complete(engine_for(model), [prompt], [free])
    assert CLOSE not in thought.token_ids[:16]
    # A token that comes for the first time a little after the budget ends sentences.
    at = next(i for i in range(8, 14) if thought.token_ids[i] not in thought.token_ids[:i])
    tokens = replace(TOKENS, ends_sentence=lambda token: token == thought.token_ids[at])
    params = replace(free, thinking_budget=6, thinking_grace=10)
    (landed,) = complete(engine_for(model, tokens=tokens), [prompt], [params])
    assert landed.token_ids[: at + 1] == thought.token_ids[: at + 1]
    assert landed.token_ids[at + 1] == CLOSE and landed.forced[at + 1]
    assert landed.thought_end == "budget" and landed.num_reasoning_tokens == at + 1
    # Without a sentence end, and then with a message that fits.
    tokens = replace(TOKENS, landing_message=(30, 31, 32))
    (cut,) = complete(engine_for(model, tokens=tokens), [prompt], [params])
    close = cut.token_ids.index(CLOSE)
    assert cut.token_ids[close - 3 : close] == (30, 31, 32) and close <= 16


def test_thinking_can_be_switched_off() -> None:
    prompt = [*random_prompts((10,))[0], OPEN]
    params = SamplingParams(max_tokens=6, seed=2, ignore_eos=True, thinking=False)
    (reply,) = complete(engine_for(hybrid_model()), [prompt], [params])
    assert reply.token_ids[0] == CLOSE and reply.forced[0]
    assert reply.thought_end == "off" and reply.num_reasoning_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([3, 96], {}, "token id 96; allowed are 0 to 95"),
        ([-1], {}, "token id -1"),
        ([3] * 500, {"max_tokens": 13}, "500 tokens and max_tokens 13 exceed the model's 512"),
        ([3], {"n": 2}, "n is 2"),
    ],
)
def test_bad_requests_are_refused(prompt, params, message: str) -> None:
    engine = engine_for(hybrid_model())
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, SamplingParams(**params))
    assert not engine.has_work
