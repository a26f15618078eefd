from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from itertools import islice

import pytest
from rich.console import Console

from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import END_OF_SENTENCE
from openm1.engine.llm import LLM
from openm1.envs.base import normalise_prompt, prompt_text
from openm1.envs.catalog import make_taskset
from openm1.envs.chain import apply_operation
from openm1.evals.metrics import EvaluationError
from openm1.evals.report import eval_json, eval_table
from openm1.evals.run import EvalConfig, evaluate
from openm1.model.m1 import M1ForCausalLM
from openm1.recipes.runs import ModelShape
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.types import Completion, SamplingParams

TOKENIZER = nano_tokenizer()
CONFIG = EvalConfig(tasks=("chain", "hop"), num_samples=60, seed=4)


class Scholar:
    """Computes chains itself; knows no hops."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.asked: list[str] = []
        self.params: list[SamplingParams] = []

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        text = TOKENIZER.decode(prompt_ids).split("user name=user\n")[1]
        question = text.split(END_OF_SENTENCE)[0]
        self.asked.append(question)
        self.params.append(params)
        if self.broken and len(self.asked) > 70:
            raise TimeoutError("asleep")
        answer = "?" if "hops" in question else self.compute(question)
        ids = TOKENIZER.encode(f"<think></think>{answer}", allow_special=True)
        return Completion(token_ids=tuple(ids), logprobs=(0.0,) * len(ids))

    def compute(self, question: str) -> str:
        start, *operations = question.split()
        value = int(start)
        for operation in operations:
            value = apply_operation(value, operation)
        return str(value)


def test_each_family_gets_its_accuracy_on_distinct_prompts():
    policy = Scholar()
    results = evaluate(policy, chat_format_for(TOKENIZER), CONFIG)
    assert list(results) == ["chain", "hop"]
    assert (results["chain"].accuracy, results["hop"].accuracy) == (1.0, 0.0)
    assert {metrics.num_samples for metrics in results.values()} == {60}
    assert len(set(policy.asked)) == 120


def test_the_seed_picks_the_tasks_and_none_is_trained_on():
    def asked(config: EvalConfig) -> list[str]:
        policy = Scholar()
        evaluate(policy, chat_format_for(TOKENIZER), config)
        return policy.asked

    assert asked(CONFIG) == asked(CONFIG)
    assert asked(CONFIG) != asked(replace(CONFIG, seed=5))
    held_out = {normalise_prompt(question) for question in asked(CONFIG)}
    for name in CONFIG.tasks:
        stream = islice(make_taskset(name).train(CONFIG.seed), 2000)
        assert held_out.isdisjoint(normalise_prompt(prompt_text(task)) for task in stream)


def test_the_policy_is_asked_as_configured():
    policy = Scholar()
    config = replace(CONFIG, max_tokens=9, temperature=0.5, thinking_budget=3)
    evaluate(policy, chat_format_for(TOKENIZER), config)
    assert {(p.max_tokens, p.temperature, p.thinking_budget) for p in policy.params} == {
        (9, 0.5, 3)
    }
    assert len({p.seed for p in policy.params}) == 60
    evaluate(policy := Scholar(), chat_format_for(TOKENIZER), CONFIG)
    assert {p.temperature for p in policy.params} == {0.0}


def test_one_failed_rollout_fails_the_evaluation():
    with pytest.raises(EvaluationError, match="50 of 60 rollouts failed: TimeoutError: asleep"):
        evaluate(Scholar(broken=True), chat_format_for(TOKENIZER), CONFIG)


def test_a_model_gets_the_same_numbers_for_the_same_seed():
    shape = ModelShape(hidden_size=32, num_hidden_layers=4, intermediate_size=32, softmax_period=4)
    model = M1ForCausalLM(shape.config(TOKENIZER))
    config = replace(CONFIG, num_samples=20, max_tokens=12, temperature=1.0)

    def numbers(seed: int) -> dict[str, object]:
        llm = LLM(model, tokenizer=TOKENIZER)
        return dict(evaluate(llm.policy, llm.chat_format, replace(config, seed=seed)))

    assert numbers(1) == numbers(1)
    assert any(numbers(1) != numbers(seed) for seed in (2, 3, 4, 5))


def test_the_report_has_its_promised_shape():
    results = evaluate(Scholar(), chat_format_for(TOKENIZER), CONFIG)
    report = json.loads(json.dumps(eval_json(results, model="m", seed=4)))
    assert report["tasks"]["chain"]["accuracy"] == 1.0
    for numbers in report["tasks"].values():
        assert {"accuracy", "num_samples", "mean_reasoning_tokens"} <= set(numbers)
    assert (report["mean_accuracy"], report["model"], report["seed"]) == (0.5, "m", 4)


def test_the_table_has_a_row_for_each_family():
    results = evaluate(Scholar(), chat_format_for(TOKENIZER), CONFIG)
    console = Console(width=120, record=True, file=StringIO())
    console.print(eval_table(results, "a title"))
    text = console.export_text()
    row = next(line for line in text.splitlines() if "chain" in line)
    assert "100.0%" in row
    assert "60" in row
    assert "a title" in text


@pytest.mark.parametrize(("name", "value"), [("tasks", ()), ("num_samples", 0)])
def test_impossible_configs_are_refused(name: str, value: object):
    with pytest.raises(ValueError, match=name):
        replace(CONFIG, **{name: value})


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="chess"):
        evaluate(Scholar(), chat_format_for(TOKENIZER), replace(CONFIG, tasks=("chess",)))
