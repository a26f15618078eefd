"""Many runs, each in a process of its own, kept as lines of JSON; none is run twice."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cispo.arms import ARMS
from benchmarks.cispo.chain import CHAIN, chain_start, run_chain
from benchmarks.cispo.run import RunPlan, run
from benchmarks.cispo.tasks import TASKS, start_weights
from openm1.model.m1 import M1ForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Names a run; its result depends on this alone."""

    task: str
    arm: str
    learning_rate: float
    seed: int


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    arm = ARMS[job.arm]
    if job.task == CHAIN:
        return asdict(job) | run_chain(arm, job.learning_rate, job.seed, chain_start(folder))
    task = TASKS[job.task]
    model = M1ForCausalLM.from_pretrained(start_weights(job.task, task, folder))
    plan = RunPlan(
        loss=arm.loss,
        learning_rate=job.learning_rate,
        seed=job.seed,
        num_updates=arm.num_updates,
        num_steps=task.num_steps,
        lengths=task.lengths,
        curriculum=task.curriculum,
    )
    return asdict(job) | run(model, task.words(), plan)


def read_results(path: Path) -> list[dict[str, Any]]:
    """A line that a killed process left unfinished is not a result."""
    results = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def append_result(path: Path, line: dict[str, Any]) -> None:
    """On a line of its own, also after one that was left unfinished."""
    with path.open("a+") as file:
        file.seek(max(0, file.tell() - 1))
        file.write(("" if file.read() in ("", "\n") else "\n") + json.dumps(line) + "\n")


def sweep(jobs: Iterable[Job], folder: Path, num_processes: int = 2) -> list[dict[str, Any]]:
    """Runs what `results.jsonl` in `folder` lacks; all results of `jobs`, in their order."""
    jobs = list(jobs)
    path = folder / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    names = list(Job.__dataclass_fields__)

    def by_job() -> dict[Job, dict[str, Any]]:
        return {Job(**{n: line[n] for n in names}): line for line in read_results(path)}

    missing = [job for job in dict.fromkeys(jobs) if job not in by_job()]
    for name in dict.fromkeys(job.task for job in missing):
        if name == CHAIN:
            chain_start(folder)
        else:
            start_weights(name, TASKS[name], folder)
    # A forked process starts with everything imported; with one thread nothing is lost by it.
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(num_processes, maxtasksperchild=1) as pool:
        waiting = [(job, pool.apply_async(run_job, (job, folder))) for job in missing]
        for number, (job, result) in enumerate(waiting, 1):
            line = result.get()
            append_result(path, line)
            rewards = line["curves"]["reward"]
            print(
                f"{number}/{len(missing)} {job.task} {job.arm} {job.learning_rate:g} "
                f"seed {job.seed}: reward {rewards[-1]:.2f}, {line['seconds']:.0f} s",
                flush=True,
            )
    results = by_job()
    return [results[job] for job in jobs]
