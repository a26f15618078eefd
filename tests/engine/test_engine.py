"""A request's tokens depend on its prompt and seed alone, whatever runs beside it or ran before."""

from __future__ import annotations

import random

import pytest
import torch

from openm1.engine.engine import Engine, EngineConfig
from openm1.model.m1 import M1ForCausalLM
from openm1.types import Completion, SamplingParams

from .tiny import CLOSE, EOS, OPEN, VOCAB, complete, engine_for, hybrid_model

# Two paths through an fp32 model. In fp64, which most tests use, no draw can be a near miss.
FP32_ERROR = 1e-5
FP64_ERROR = 1e-11
LENGTHS = (1, 2, 3, 5, 7, 11, 16, 23, 31, 47, 63, 64, 65, 80, 100, 128, 129, 150, 177, 200)


def random_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    # Nothing special in a prompt, and ids above the tokenizer's are allowed to be read.
    draw = random.Random(seed)
    return [[draw.randrange(CLOSE + 1, 96) for _ in range(length)] for length in lengths]


def mixed_params(count: int) -> list[SamplingParams]:
    """Greedy and sampled in turn, each with its own seed, length and temperature."""
    kinds = (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.8},
    )
    return [
        SamplingParams(max_tokens=4 + i % 9, seed=100 + i, **kinds[i % len(kinds)])
        for i in range(count)
    ]


def alone(
    model: M1ForCausalLM, prompts: list[list[int]], params: list[SamplingParams]
) -> list[Completion]:
    """Each in an engine of its own."""
    return [
        complete(engine_for(model), [prompt], [each])[0]
        for prompt, each in zip(prompts, params, strict=True)
    ]


def assert_same(ours: list[Completion], expected: list[Completion], error: float) -> None:
    for mine, other in zip(ours, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.finish_reason == other.finish_reason
        assert mine.logprobs == pytest.approx(other.logprobs, abs=error, rel=0)


@pytest.fixture(scope="module")
def twenty():
    """A model, twenty prompts, and what each gives alone."""
    model = hybrid_model(torch.float64)
    prompts, params = random_prompts(), mixed_params(len(LENGTHS))
    return model, prompts, params, alone(model, prompts, params)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 7},
        {"max_prefill_tokens": 37},
        {"max_num_seqs": 3, "max_prefill_tokens": 1},
    ],
    ids=str,
)
def test_twenty_prompts_in_a_batch_give_what_each_gives_alone(twenty, limits) -> None:
    model, prompts, params, expected = twenty
    # Long ones prefilled token by token take long and show nothing that short ones do not.
    longest = 20 if limits.get("max_prefill_tokens") == 1 else 200
    keep = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
    for shuffled in (False, True):
        order = random.Random(3).sample(keep, len(keep)) if shuffled else keep
        engine = engine_for(model, **limits)
        batched = complete(engine, [prompts[i] for i in order], [params[i] for i in order])
        assert_same(batched, [expected[i] for i in order], FP64_ERROR)


def test_so_do_they_in_fp32() -> None:
    model, prompts, params = hybrid_model(), random_prompts(), mixed_params(len(LENGTHS))
    batched = complete(engine_for(model, max_num_seqs=12), prompts, params)
    assert_same(batched, alone(model, prompts, params), FP32_ERROR)


def test_late_comers_change_nothing(twenty) -> None:
    """Requests that arrive while others are being decoded."""
    model, prompts, params, expected = twenty
    engine = engine_for(model)
    requests = []
    for prompt, each in zip(prompts, params, strict=True):
        requests.append(engine.submit(prompt, each))
        engine.step()
    while engine.has_work:
        engine.step()
    assert_same([engine.completion(request) for request in requests], expected, FP64_ERROR)


def test_what_random_models_say_depends_on_the_prompt(twenty) -> None:
    """Otherwise the tests above would prove nothing."""
    expected = twenty[-1]
    assert len({c.token_ids for c in expected}) == len(expected)
    assert len({token for c in expected for token in c.token_ids}) > 30


def test_logprobs_are_those_of_a_full_forward_pass(twenty) -> None:
    model, prompts, params, expected = twenty
    for prompt, each, completion in zip(prompts, params, expected, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            logits = model(ids)[0, len(prompt) - 1 : -1, :VOCAB]
        if each.temperature == 0:
            assert logits.argmax(-1).tolist() == list(completion.token_ids)
        logprobs = (logits / (each.temperature or 1.0)).log_softmax(-1)
        oracle = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
        assert completion.logprobs == pytest.approx(oracle, abs=FP64_ERROR, rel=0)


def test_stale_and_poisoned_slots_are_never_read(twenty) -> None:
    model, prompts, params, expected = twenty
    engine = engine_for(model, max_num_seqs=8)
    complete(engine, prompts[-8:], params[-8:])
    for _ in range(2):
        poison_free_slots(engine)
        assert_same(complete(engine, prompts, params), expected, FP64_ERROR)


def poison_free_slots(engine: Engine) -> None:
    cache = engine._cache
    assert cache is not None and engine._free
    with torch.inference_mode():
        for table in (*cache.states.values(), *cache.keys.values(), *cache.values.values()):
            table[engine._free] = torch.nan


def test_the_cache_grows_without_losing_running_sequences(twenty) -> None:
    """One request first, so that there is one slot when the others come."""
    model, prompts, params, expected = twenty
    engine = engine_for(model, max_num_seqs=20)
    first = engine.submit(prompts[5], params[5])
    engine.step()
    rest = complete(engine, prompts[6:], params[6:])
    assert_same([engine.completion(first), *rest], expected[5:], FP64_ERROR)


def grown(prompt: list[int], completion: Completion, *extra: int) -> list[int]:
    return [*prompt, *completion.token_ids, *extra]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_second_turn_equals_a_cold_start(temperature: float) -> None:
    model = hybrid_model(torch.float64)
    params = SamplingParams(max_tokens=9, temperature=temperature, seed=4)
    engine = engine_for(model)
    prompt = random_prompts((30,))[0]
    for turn in range(3):
        (warm,) = complete(engine, [prompt], [params], session="talk")
        (cold,) = complete(engine_for(model), [prompt], [params])
        assert_same([warm], [cold], FP64_ERROR)
        assert cold.cached_tokens == 0
        # All but the newest sampled token and what the user added.
        assert warm.cached_tokens == (len(prompt) - 4 if turn else 0)
        prompt = grown(prompt, warm, 20, 21, 22)


def test_a_second_turn_computes_only_what_is_new() -> None:
    model = hybrid_model()
    engine = engine_for(model)
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    prompt = random_prompts((40,))[0]
    (first,) = complete(engine, [prompt], [params], session="talk")
    counted = count_tokens(model)
    complete(engine, [grown(prompt, first, 20, 21)], [params], session="talk")
    # The newest token of the first turn, two new ones, and four decoded.
    assert sum(counted) == 1 + 2 + 4


def count_tokens(model: M1ForCausalLM) -> list[int]:
    counted: list[int] = []
    model.model.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))
    return counted


@pytest.mark.parametrize("change", ["early", "late", "cached", "same", "shorter"])
def test_a_changed_history_starts_cold(change: str) -> None:
    model = hybrid_model(torch.float64)
    engine = engine_for(model)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    prompt = random_prompts((30,))[0]
    (first,) = complete(engine, [prompt], [params], session="talk")
    second = grown(prompt, first, 20, 21)
    if change == "early":
        second[0] = 50 if second[0] != 50 else 51
    elif change == "late":
        second[len(prompt)] = 50 if second[len(prompt)] != 50 else 51
    elif change == "cached":
        # Nothing is left to compute, so that there would be no logits.
        second = second[: len(prompt) + 5]
    elif change == "same":
        second = prompt
    else:
        second = prompt[:10]
    (warm,) = complete(engine, [second], [params], session="talk")
    (cold,) = complete(engine_for(model), [second], [params])
    assert warm.cached_tokens == 0
    assert_same([warm], [cold], FP64_ERROR)


def test_the_session_used_longest_ago_makes_room() -> None:
    model = hybrid_model(torch.float64)
    engine = engine_for(model, max_num_seqs=2)
    params = SamplingParams(max_tokens=3, temperature=0.0)
    prompts = dict(zip("abc", random_prompts((10, 11, 12)), strict=True))
    for name, prompt in prompts.items():
        (first,) = complete(engine, [prompt], [params], session=name)
        prompts[name] = grown(prompt, first, 20)
    cached = {}
    for name in "cba":
        (second,) = complete(engine, [prompts[name]], [params], session=name)
        (cold,) = complete(engine_for(model), [prompts[name]], [params])
        assert_same([second], [cold], FP64_ERROR)
        cached[name] = second.cached_tokens > 0
    assert cached == {"c": True, "b": True, "a": False}


def test_two_requests_of_one_session_side_by_side_lose_no_slot() -> None:
    model = hybrid_model()
    engine = engine_for(model, max_num_seqs=3)
    params = [SamplingParams(max_tokens=m, temperature=0.0) for m in (2, 5)]
    prompts = random_prompts((8, 9))
    for _ in range(3):
        complete(engine, prompts, params, session="talk")  # check_integrity sees a lost slot.


def test_equal_prompts_are_prefilled_once() -> None:
    model = hybrid_model(torch.float64)
    prompt, other = random_prompts((50, 20))
    prompts = [prompt, other, prompt, prompt]
    params = [SamplingParams(max_tokens=6, seed=i, ignore_eos=True) for i in range(4)]
    expected = alone(model, prompts, params)
    counted = count_tokens(model)
    assert_same(complete(engine_for(model), prompts, params), expected, FP64_ERROR)
    assert sum(counted) == 50 + 20 + 4 * 5
    assert len({c.token_ids for c in expected}) == 4


def test_equal_prompts_of_two_sessions_are_prefilled_once() -> None:
    model = hybrid_model(torch.float64)
    engine = engine_for(model)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    start = random_prompts((20,))[0]
    (first,) = complete(engine, [start], [params], session="a")
    prompt = grown(start, first, 20, 21)
    expected = alone(model, [prompt], [params])
    counted = count_tokens(model)
    requests = [engine.submit(prompt, params, session=name) for name in ("b", "a", "c")]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert_same([engine.completion(request) for request in requests], 3 * expected, FP64_ERROR)
    assert sum(counted) == 3 + 3 * 3


def test_slots_are_never_lost() -> None:
    """Random submissions, aborts and sessions; the books are checked after every step."""
    engine = engine_for(hybrid_model(), max_num_seqs=4)
    draw = random.Random(0)
    live = []
    for _ in range(100):
        action = draw.random()
        if action < 0.5:
            prompt = random_prompts((draw.randrange(1, 9),), seed=draw.randrange(5))[0]
            params = SamplingParams(max_tokens=draw.randrange(1, 6), seed=1)
            session = draw.choice([None, None, "a", "b", "c"])
            live.append(engine.submit(prompt, params, session=session))
        elif action < 0.7 and live:
            engine.abort(draw.choice(live))
        engine.step()
        engine.check_integrity()
    for request in live:
        engine.abort(request)
    engine.check_integrity()
    assert not engine.has_work
    assert {r.finish_reason for r in live} >= {"abort", "length"}


def test_an_error_in_the_model_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid_model(torch.float64)
    engine = engine_for(model)
    prompts, params = random_prompts((5, 9)), mixed_params(2)
    expected = alone(model, prompts, params)
    requests = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    for failing_pass in range(2):
        if failing_pass:
            requests = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
            engine.step()
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
            patch.setattr(model.model, "forward", broken)
            engine.step()
        for request in requests:
            engine.abort(request)
        engine.check_integrity()
        assert not engine.has_work
    assert_same(complete(engine, prompts, params), expected, FP64_ERROR)


def broken(*_: object) -> None:
    raise RuntimeError("broken")


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


def test_new_weights_change_the_reply_and_forget_sessions() -> None:
    model, other = hybrid_model(torch.float64), hybrid_model(torch.float64, initializer_range=0.21)
    engine = engine_for(model)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    prompt = random_prompts((20,))[0]
    (first,) = complete(engine, [prompt], [params], session="talk")
    assert first.policy_version == 0
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    engine.load_weights(other.named_parameters(), version=7)
    engine.check_integrity()
    second = grown(prompt, first, 20)
    (warm,) = complete(engine, [second], [params], session="talk")
    (cold,) = complete(engine_for(other), [second], [params])
    assert warm.cached_tokens == 0 and warm.policy_version == 7
    assert_same([warm], [cold], FP64_ERROR)
    # A trainer that shares its model: its own tensors are not copied.
    engine.load_weights(model.named_parameters(), version=8)
    assert engine.policy_version == 8


def test_bad_weights_are_refused() -> None:
    model = hybrid_model()
    engine = engine_for(model)
    with pytest.raises(ValueError, match="unknown weight 'nonsense'"):
        engine.load_weights([("nonsense", torch.zeros(1))], version=1)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[32\]; expected \[96, 32\]"):
        engine.load_weights([("lm_head.weight", torch.zeros(32))], version=1)
    request = engine.submit([20], SamplingParams(max_tokens=3))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="while requests run"):
            engine.load_weights(model.named_parameters(), version=1)
        engine.step()
    engine.abort(request)
    assert engine.policy_version == 0


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


def test_the_last_position_can_be_used() -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    (completion,) = complete(engine_for(hybrid_model()), [[20] * 500], [params])
    assert len(completion.token_ids) == 12


@pytest.mark.parametrize("name", ["max_num_seqs", "max_prefill_tokens"])
def test_bad_limits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        EngineConfig(**{name: 0})
