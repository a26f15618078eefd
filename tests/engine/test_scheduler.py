from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openm1.engine.cache.hybrid import CachedSequence
from openm1.engine.request import Request
from openm1.engine.scheduler import Chunk, Scheduler, StepPlan
from openm1.engine.thinking import ThoughtTracker
from openm1.types import SamplingParams
from tests.engine.symbolic import SymbolicMemory, cache_of


def request_for(
    prompt_ids: list[int], *, max_tokens: int = 4, priority: int = 0, snapshot_at=()
) -> Request:
    return Request(
        prompt_ids=list(prompt_ids),
        params=SamplingParams(max_tokens=max_tokens, priority=priority, seed=0),
        snapshot_at=set(snapshot_at),
        thought=ThoughtTracker((), ()),
    )


class Engine:
    """The loop around a scheduler, with a model that writes random tokens of a few."""

    def __init__(
        self, *, max_num_seqs: int = 99, max_step_tokens: int = 10**6, seed: int = 0, **sizes: int
    ) -> None:
        self.cache = cache_of(**sizes)
        self.memory = SymbolicMemory(self.cache)
        self.scheduler = Scheduler(
            self.cache, max_num_seqs=max_num_seqs, max_step_tokens=max_step_tokens
        )
        self.random = Random(seed)
        self.done: list[Request] = []
        self.num_preempted = 0

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> StepPlan:
        was_running = set(self.scheduler.running)
        plan = self.scheduler.schedule()
        self.num_preempted += len(was_running & set(self.scheduler.waiting))
        self.scheduler.check_integrity()
        self._check(plan)
        self.memory.carry_out_orders()
        for request in self.scheduler.running:
            if sequence_of(request) not in self.memory.expected:
                self.memory.begin(sequence_of(request), request.token_ids)
        for chunk in plan.prefill:
            token_ids = chunk.request.token_ids[chunk.start : chunk.end]
            self.memory.run(sequence_of(chunk.request), token_ids)
        for request in plan.decode:
            self.memory.run(sequence_of(request), request.token_ids[-1:])
        self.scheduler.ran(plan)
        for request in plan.decode:
            request.output_ids.append(self.random.randrange(2))
            if len(request.output_ids) == request.params.max_tokens:
                self.scheduler.finish(request)
                self.done.append(request)
        self.check()
        return plan

    def _check(self, plan: StepPlan) -> None:
        planned = [*plan.decode, *(chunk.request for chunk in plan.prefill)]
        assert planned or not self.scheduler.has_work, "it stands still"
        assert len(set(planned)) == len(planned) and set(planned) <= set(self.scheduler.running)
        assert all(sequence_of(r).num_tokens == r.num_tokens - 1 for r in plan.decode)
        for chunk in plan.prefill:
            assert sequence_of(chunk.request).num_tokens == chunk.start < chunk.end
            assert chunk.end < chunk.request.num_tokens
        assert len(plan.decode) + num_prefilled(plan) <= self.scheduler.max_step_tokens

    def check(self) -> None:
        self.scheduler.check_integrity()
        for request in self.scheduler.running:
            self.memory.check(sequence_of(request))

    def run(self) -> list[StepPlan]:
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
        return plans


def sequence_of(request: Request) -> CachedSequence:
    assert request.sequence is not None
    return request.sequence


def num_prefilled(*plans: StepPlan) -> int:
    return sum(chunk.end - chunk.start for plan in plans for chunk in plan.prefill)


def test_a_prompt_is_prefilled_but_for_its_last_token_and_then_decoded():
    engine, request = Engine(), request_for([1, 2, 3], max_tokens=2)
    engine.add(request)
    assert engine.step() == StepPlan(prefill=[Chunk(request, 0, 2)])
    assert engine.step() == StepPlan(decode=[request])
    assert engine.step() == StepPlan(decode=[request])
    assert engine.done == [request] and request.sequence is None
    assert not engine.scheduler.has_work and engine.step() == StepPlan()


def test_a_prompt_of_one_token_is_decoded_at_once():
    engine, request = Engine(), request_for([1])
    engine.add(request)
    assert engine.step() == StepPlan(decode=[request])


@pytest.mark.parametrize("length", [2, 3, 8, 9, 17])
def test_the_second_identical_prompt_hits_all_but_its_last_token(length):
    engine = Engine()
    prompt = list(range(length))
    first, second = request_for(prompt), request_for(prompt)
    engine.add(first)
    engine.run()
    engine.add(second)
    assert num_prefilled(*engine.run()) == 0
    assert (first.num_cached, second.num_cached) == (0, length - 1)


def test_sixteen_equal_prompts_are_prefilled_once():
    engine = Engine(page_tokens=4)
    prompt = list(range(30))
    group = [request_for(prompt) for _ in range(16)]
    engine.add(*group)
    first, second = engine.step(), engine.step()
    assert first.prefill == [Chunk(group[0], 0, 29)] and first.decode == []
    assert set(second.decode) == set(group) and second.prefill == []
    engine.run()
    assert [request.num_cached for request in group] == [0] + [29] * 15


def test_whoever_comes_behind_a_waiting_group_is_not_held_up():
    engine = Engine(max_step_tokens=100)
    requests = [request_for([i] * 20) for i in (1, 1, 2, 2)]
    engine.add(*requests)
    assert engine.step().prefill == [Chunk(requests[0], 0, 19), Chunk(requests[2], 0, 19)]
    assert set(engine.step().decode) == set(requests)


def test_a_small_request_does_not_overtake_one_that_waits_for_memory():
    engine = Engine(page_tokens=1, page_bytes=1, state_bytes=0, budget_bytes=10)
    first, large, small = (request_for([i] * n, max_tokens=2) for i, n in ((1, 5), (2, 8), (3, 2)))
    engine.add(first, large, small)
    assert engine.step().prefill == [Chunk(first, 0, 4)]
    engine.step()
    engine.step()
    # What the first had was freed, and what was refused before is looked at again.
    assert engine.done == [first] and engine.step().prefill[0] == Chunk(large, 0, 7)
    engine.run()
    assert engine.done == [first, large, small]


def test_a_refused_request_is_looked_up_again_when_memory_was_freed_and_not_before():
    engine = Engine(page_tokens=1, page_bytes=1, state_bytes=0, budget_bytes=10)
    engine.add(*(request_for([i] * 4, max_tokens=4, priority=-i) for i in range(4)))
    looked_up, start = [], engine.cache.start
    engine.cache.start = lambda ids: looked_up.append(ids[0]) or start(ids)
    engine.step()
    engine.step()
    assert looked_up == [0, 1, 2]
    engine.scheduler.abort(engine.scheduler.running[1])
    engine.step()
    assert looked_up == [0, 1, 2, 2, 3]


def test_of_prompts_that_share_their_first_half_the_second_finds_the_place_for_the_third():
    engine = Engine()
    half = list(range(20))
    requests = [request_for(half + [100 + i] * 20) for i in range(3)]
    for request in requests:
        engine.add(request)
        engine.run()
    assert [request.num_cached for request in requests] == [0, 0, 20]


def test_a_mark_of_the_callers_is_hit_at_once():
    engine = Engine()
    first = request_for([*range(10), 50, 51], snapshot_at=[10])
    second = request_for([*range(10), 60, 61])
    for request in (first, second):
        engine.add(request)
        engine.run()
    assert second.num_cached == 10


def test_the_next_turn_finds_prompt_and_answer():
    engine, first = Engine(), request_for([1, 2, 3], max_tokens=5)
    engine.add(first)
    engine.run()
    second = request_for([*first.token_ids, 7, 7])
    engine.add(second)
    engine.run()
    # The last token of an answer is sampled and never run.
    assert second.num_cached == 3 + 5 - 1


def test_without_states_any_shared_token_is_hit():
    engine = Engine(state_bytes=0)
    for prompt, expected in (([1, 2, 3, 4], 0), ([1, 2, 9, 9], 2), ([1, 2, 3, 4], 3)):
        request = request_for(prompt)
        engine.add(request)
        engine.run()
        assert request.num_cached == expected


def test_a_step_takes_decode_rows_first_and_prefill_as_room_is_left():
    engine = Engine(max_step_tokens=8)
    short, long = request_for([1, 2], max_tokens=9), request_for(list(range(20)))
    engine.add(short)
    engine.step()
    engine.add(long)
    assert engine.step() == StepPlan(prefill=[Chunk(long, 0, 7)], decode=[short])
    assert engine.step() == StepPlan(prefill=[Chunk(long, 7, 14)], decode=[short])
    assert engine.step() == StepPlan(prefill=[Chunk(long, 14, 19)], decode=[short])
    assert set(engine.step().decode) == {short, long}


def test_the_tokens_of_a_step_bound_how_many_run():
    engine = Engine(max_step_tokens=4)
    requests = [request_for([i, 100 + i], max_tokens=9) for i in range(6)]
    engine.add(*requests)
    for _ in range(3):
        plan = engine.step()
    assert plan == StepPlan(decode=requests[:4])
    engine.run()
    assert engine.done == requests


def test_no_more_run_than_are_allowed():
    engine = Engine(max_num_seqs=2)
    requests = [request_for([i, i], max_tokens=1) for i in range(5)]
    engine.add(*requests)
    engine.step()
    assert engine.scheduler.running == requests[:2]
    engine.run()
    assert engine.done == requests


def test_the_best_priority_goes_first_then_who_came_first():
    engine = Engine(max_num_seqs=1)
    requests = [request_for([i], max_tokens=1, priority=p) for i, p in enumerate([0, 5, 0, 5, 9])]
    engine.add(*requests)
    assert engine.scheduler.waiting == [requests[i] for i in (4, 1, 3, 0, 2)]
    engine.run()
    assert engine.done == [requests[i] for i in (4, 1, 3, 0, 2)]


def test_a_better_request_prefills_first():
    engine = Engine(max_step_tokens=4)
    low, high = request_for([1] * 20), request_for([2] * 9, priority=1)
    engine.add(low)
    engine.step()
    # The better one needs room in a step, which the other leaves when its end is near.
    engine.scheduler.abort(low)
    engine.add(low, high)
    assert engine.step().prefill == [Chunk(high, 0, 4)]
    assert engine.step().prefill == [Chunk(high, 4, 8)]
    plan = engine.step()
    assert plan.decode == [high] and plan.prefill[0].request is low


def test_the_worst_makes_way_when_memory_is_short():
    # Pages of one token and no states: ten tokens fit.
    engine = Engine(page_tokens=1, page_bytes=1, state_bytes=0, budget_bytes=10)
    low = request_for([1, 1], max_tokens=8, priority=0)
    high = request_for([2, 2], max_tokens=9, priority=1)
    late = request_for([3, 3], max_tokens=8, priority=0)
    engine.add(low, high, late)
    order = []
    while engine.scheduler.has_work:
        engine.step()
        order += [r for r in engine.scheduler.waiting if r not in order]
    assert order == [late, low], "the latest of the lowest priority goes first"
    assert engine.done == [high, low, late]
    assert [len(r.output_ids) for r in engine.done] == [9, 8, 8]


def test_who_asks_for_room_and_is_the_worst_makes_way_itself():
    engine = Engine(page_tokens=1, page_bytes=1, state_bytes=0, budget_bytes=9)
    first, second = request_for([1] * 4, max_tokens=3), request_for([2] * 4, max_tokens=3)
    engine.add(first, second)
    engine.step()
    # The first takes the last page, the second finds none.
    assert engine.step().decode == [first, second]
    assert engine.step().decode == [first]
    assert engine.scheduler.waiting == [second] and len(second.output_ids) == 1
    engine.run()
    assert engine.done == [first, second]


def test_what_was_cached_is_counted_at_the_first_admission_alone():
    engine = Engine(page_tokens=1, page_bytes=1, state_bytes=0, budget_bytes=12)
    request = request_for([1] * 4, max_tokens=5)
    engine.add(request)
    engine.step()
    engine.step()
    engine.scheduler.restart_all()
    assert request.sequence is None and len(request.output_ids) == 1
    engine.add(request_for([1] * 3, max_tokens=1, priority=1))
    engine.run()
    assert request.num_cached == 0


def test_a_follower_takes_over_when_the_leader_is_aborted():
    engine = Engine(max_step_tokens=5)
    leader, follower = (request_for([1] * 20, max_tokens=1) for _ in range(2))
    engine.add(leader, follower)
    engine.step()
    engine.step()
    assert engine.scheduler.waiting == [follower]
    engine.scheduler.abort(leader)
    engine.check()
    assert engine.step().prefill == [Chunk(follower, 0, 5)]
    engine.scheduler.abort(follower)
    assert not engine.scheduler.has_work and engine.cache.num_bytes_in_use == 0


def test_a_waiting_request_can_be_aborted():
    engine = Engine(max_num_seqs=1)
    first, second = request_for([1, 2]), request_for([3, 4])
    engine.add(first, second)
    engine.step()
    engine.scheduler.abort(second)
    engine.run()
    assert engine.done == [first]


def test_nobody_waits_for_the_same_prompt_of_a_worse_request():
    engine = Engine(max_step_tokens=20)
    low = request_for([1] * 100, snapshot_at=[10, 15])
    high, second_high = (request_for([1] * 100, priority=5) for _ in range(2))
    engine.add(low)
    assert engine.step().prefill == [Chunk(low, 0, 10)]
    engine.add(high)
    assert engine.step().prefill == [Chunk(low, 10, 15), Chunk(high, 10, 25)]
    engine.scheduler.max_step_tokens = 200
    engine.add(second_high)
    assert engine.step().prefill == [Chunk(high, 25, 99), Chunk(low, 15, 99)]
    assert set(engine.step().decode) == {low, high, second_high}


def test_followers_without_a_snapshot_still_get_their_turn():
    # Memory for the leader and nothing else: no snapshot, and no second sequence beside it.
    engine = Engine(page_bytes=0, state_bytes=1, budget_bytes=1)
    group = [request_for([1] * 6, max_tokens=2) for _ in range(3)]
    engine.add(*group)
    engine.run()
    assert engine.done == group


def test_restarted_requests_keep_their_order_and_are_computed_with_the_new_weights():
    engine = Engine()
    requests = [request_for([i] * 5) for i in range(3)]
    engine.add(*requests)
    for _ in range(3):
        engine.step()
    written = [list(request.output_ids) for request in requests]
    engine.scheduler.restart_all()
    engine.cache.clear()
    engine.memory.version += 1
    assert engine.cache.num_bytes_in_use == 0
    assert engine.scheduler.waiting == requests and engine.scheduler.running == []
    plan = engine.step()
    assert [chunk.end for chunk in plan.prefill] == [4, 4, 4], "first to where prompts end"
    engine.run()
    assert [r.output_ids[:2] for r in requests] == written


def test_what_could_never_run_is_refused():
    engine = Engine(page_tokens=2, page_bytes=1, state_bytes=3, budget_bytes=8)
    engine.add(request_for([1] * 7, max_tokens=4))
    with pytest.raises(ValueError, match=r"prompt of 8 tokens and max_tokens 4 need 9 bytes.*8"):
        engine.add(request_for([1] * 8, max_tokens=4))
    engine.run()


# Bytes of a page and of a state, and how many of the longest requests fit side by side.
SHAPES = {
    "hybrid": (2, 3, 1.6),
    "softmax": (1, 0, 1.3),
    "lightning": (0, 1, 3),
    "roomy": (1, 1, 20),
}
LONGEST_PROMPT, LONGEST_ANSWER = 9, 12


@pytest.mark.parametrize("page_tokens", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 2**32), max_step_tokens=st.sampled_from([1, 3, 8, 100]))
@settings(max_examples=12)
def test_random_traffic_ends_with_every_answer_whole_and_nothing_held(
    page_tokens, shape, seed, max_step_tokens
):
    random = Random(seed)
    page_bytes, state_bytes, room = SHAPES[shape]
    longest = -(-(LONGEST_PROMPT + LONGEST_ANSWER - 1) // page_tokens) * page_bytes + state_bytes
    engine = Engine(
        max_num_seqs=random.choice([1, 3, 8]),
        max_step_tokens=max_step_tokens,
        seed=seed,
        page_tokens=page_tokens,
        page_bytes=page_bytes,
        state_bytes=state_bytes,
        budget_bytes=int(room * longest),
    )
    scheduler, aborted, added = engine.scheduler, [], []
    for _ in range(60):
        action = random.choices(
            ["add", "step", "abort", "restart", "weights"], [6, 12, 1, 0.3, 0.3]
        )
        if action == ["add"]:
            length, copies = random.randint(1, LONGEST_PROMPT), random.choice([1, 1, 3])
            prompt = [random.randrange(2) for _ in range(length)]
            for _ in range(copies):
                marks = random.sample(range(12), random.choice([0, 0, 1]))
                request = request_for(
                    prompt,
                    max_tokens=random.randint(1, LONGEST_ANSWER),
                    priority=random.choice([0, 0, 1]),
                    snapshot_at=marks,
                )
                engine.add(request)
                added.append(request)
        elif action == ["abort"] and scheduler.has_work:
            aborted.append(random.choice([*scheduler.waiting, *scheduler.running]))
            scheduler.abort(aborted[-1])
        elif action == ["restart"]:
            scheduler.restart_all()
        elif action == ["weights"]:
            engine.cache.clear()
            engine.memory.version += 1
        else:
            engine.step()
        engine.check()
    engine.run()
    assert sorted(map(id, [*engine.done, *aborted])) == sorted(map(id, added))
    assert all(r.num_cached < len(r.prompt_ids) for r in added)
    assert engine.cache.num_bytes_held == 0
    engine.cache.clear()
    assert engine.cache.num_bytes_in_use == 0
