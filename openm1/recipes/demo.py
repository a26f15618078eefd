"""The whole idea in view: born, taught, made to forget, and thinking again by CISPO."""

from __future__ import annotations

import os
import shutil
import sys
import time
import webbrowser
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openm1.common.device import enable_fast_fp32_matmul
from openm1.engine.llm import LLM
from openm1.envs.catalog import make_taskset
from openm1.evals.run import EvalConfig, evaluate
from openm1.recipes import chain
from openm1.recipes.card import read_card
from openm1.recipes.demo_report import Answer, DemoResult, Stage, Trace, write_report
from openm1.recipes.runs import run_rl, run_supervised
from openm1.types import Message, SamplingParams, Task

RUNS = ("pretrain", "sft", "rl", "rl-capped")
SEED = 2026
NUM_SAMPLES = 400
MAX_TOKENS = 24
BUDGETS = (0, 3, 5, 7, 9, 11, 13)
CAPPED_TOKENS = 10
"""A response window too short for a full thought, as 40K is for some that 80K can hold."""
MAX_THREADS = 4
"""More threads than this cost a model of this size more than they give."""

NEXT = """What to try next:
  {openm1} chat                talk with the shipped nano
  {openm1} rl chain --help     train your own way: DAPO, GRPO, other windows
  {openm1} inspect m1-80k      count the 456 B original
  {openm1} eval --tasks chain --thinking-budget 7 \\
    --model {model}"""


def run_demo(folder: Path, *, open_report: bool = False) -> None:
    """Trains in `folder`; a demo that was stopped goes on, a finished one starts over.

    Nothing is removed but what a demo wrote.
    """
    began = time.monotonic()
    console = Console()
    report = folder / "report.html"
    if report.exists():
        for name in RUNS:
            shutil.rmtree(folder / name, ignore_errors=True)
        report.unlink()
    torch.set_num_threads(min(MAX_THREADS, os.cpu_count() or 1))
    enable_fast_fp32_matmul()
    result = train_and_measure(folder, console)
    seconds = time.monotonic() - began
    write_report(report, result, seconds)
    console.print(f"\nReport with plots: {report} ({seconds:.0f} s in all)\n", highlight=False)
    command = sys.argv[0] if Path(sys.argv[0]).name == "openm1" else "openm1"
    after = result.stages[2].checkpoint
    console.print(NEXT.format(openm1=command, model=after), highlight=False, soft_wrap=True)
    if open_report:
        webbrowser.open(report.resolve().as_uri())


def train_and_measure(folder: Path, console: Console) -> DemoResult:
    """The three stages, CISPO once more with a short window, and what each can do."""
    folders = [folder / name for name in RUNS]
    pretrain = replace(chain.PRETRAIN, folder=folders[0])
    cold_start = replace(chain.COLD_START, folder=folders[1], init=pretrain.folder)
    cispo = replace(chain.CISPO_RUN, folder=folders[2], init=cold_start.folder)
    capped = replace(
        cispo,
        folder=folders[3],
        rl=replace(cispo.rl, max_response_tokens=CAPPED_TOKENS),
    )
    _say(console, 1, "Pretraining: a hybrid lightning-attention mixture of experts is born.")
    born = _measure("pretrained", run_supervised(pretrain, "pretraining"))
    _say(console, 2, "Cold start: it is shown hasty thoughts, which mostly fail.")
    before = _measure("cold start", run_supervised(cold_start, "cold start"))
    _say(console, 3, "CISPO: only right or wrong is said; it finds the long thought again.")
    after = _measure("CISPO", run_rl(cispo, "CISPO"))
    _say(console, 4, f"CISPO with the window capped at {CAPPED_TOKENS} tokens, for comparison.")
    short = _measure(f"capped at {CAPPED_TOKENS}", run_rl(capped, "CISPO capped"), CAPPED_TOKENS)
    result = DemoResult(
        folder=folder,
        stages=[born, before, after, short],
        traces=_traces(before.checkpoint, after.checkpoint),
        answers=[],
    )
    show_result(result, console)
    return replace(result, answers=ask_shipped(console))


def _say(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}.[/bold] {text}", highlight=False)


def _measure(name: str, checkpoint: Path, window: int = MAX_TOKENS) -> Stage:
    """Held-out greedy accuracy in a window of tokens, free and under each thinking budget."""
    llm = LLM(checkpoint)
    config = EvalConfig(tasks=("chain",), num_samples=NUM_SAMPLES, seed=SEED, max_tokens=window)
    free = evaluate(llm.policy, llm.chat_format, config)["chain"]
    curve = {}
    for budget in BUDGETS:
        asked = replace(config, thinking_budget=budget)
        curve[budget] = evaluate(llm.policy, llm.chat_format, asked)["chain"].accuracy
    return Stage(name=name, checkpoint=checkpoint, metrics=free, accuracy_by_budget=curve)


def _traces(before: Path, after: Path) -> list[Trace]:
    """Two held-out questions, the long way round, answered by both models."""
    tasks = make_taskset("chain").test(SEED, NUM_SAMPLES)
    longest = sorted(tasks, key=lambda task: -len(task.prompt[-1].content))[:2]
    replies = [_ask(LLM(path), task) for path in (before, after) for task in longest]
    return [
        Trace(task.prompt[-1].content, task.answer, replies[i], replies[len(longest) + i])
        for i, task in enumerate(longest)
    ]


def _ask(llm: LLM, task: Task) -> Message:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    completion = llm.chat(list(task.prompt), params)
    return Message(role="assistant", reasoning=completion.reasoning, content=completion.text)


def show_result(result: DemoResult, console: Console) -> None:
    title = f"{NUM_SAMPLES} held-out chains, greedy: free, and with N tokens of thought allowed"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("accuracy", "thought", *(f"{budget}" for budget in BUDGETS)):
        table.add_column(heading, justify="right")
    for stage in result.stages:
        curve = [f"{stage.accuracy_by_budget[b]:.0%}" for b in BUDGETS]
        free = f"{stage.metrics.mean_reasoning_tokens:.1f}"
        table.add_row(stage.name, f"{stage.metrics.accuracy:.1%}", free, *curve)
    console.print()
    console.print(table)
    for trace in result.traces:
        console.print(f"\n{trace.question}   (right: {trace.answer})", highlight=False)
        for name, reply in (("before", trace.before), ("after", trace.after)):
            mark = "[green]right[/green]" if reply.content == trace.answer else "[red]wrong[/red]"
            thought = escape(reply.reasoning or "")
            console.print(
                f"  {name:>6}: [dim]{thought}[/dim] -> {escape(reply.content)}  {mark}",
                highlight=False,
            )


def ask_shipped(console: Console) -> list[Answer]:
    """The shipped nano on the held-out questions of its card, with its thought."""
    console.print("\n[bold]5.[/bold] The shipped nano answers, thinking aloud.", highlight=False)
    llm = LLM("nano")
    answers = []
    for example in read_card("nano").examples:
        question = [Message(role="user", content=example["question"])]
        completion = llm.chat(question, SamplingParams(max_tokens=512, temperature=0.0))
        console.print(f"\n{escape(example['question'])}", highlight=False)
        console.print(f"[dim]{escape(completion.reasoning or '')}[/dim]", highlight=False)
        mark = "" if completion.text == example["answer"] else f" (right: {example['answer']})"
        console.print(f"[bold]{escape(completion.text)}[/bold]{escape(mark)}", highlight=False)
        reply = Message(role="assistant", reasoning=completion.reasoning, content=completion.text)
        answers.append(Answer(example["question"], example["answer"], reply))
    return answers
