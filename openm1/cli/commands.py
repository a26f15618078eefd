"""The commands. Each imports what it needs, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

if TYPE_CHECKING:
    from datetime import datetime

    from openm1.engine.config import EngineConfig

Kernels = Literal["auto", "torch", "cpu"]
Dtype = Literal["float32", "bfloat16", "float64"]
Weights = Literal["full", "int8"]
TRAINERS = ("drill", "pretrain", "multiturn", "sft", "rl")

# A flag has one form, the one that changes something: --json, not --no-json beside it.
TYRO_CONFIG = (FlagCreatePairsOff,)


def inspect(model: Positional[str], *, json_: Annotated[bool, arg(name="json")] = False) -> None:
    """Sizes of a preset (m1-40k, m1-80k), a model folder, a .gguf file or a shipped model.

    The last two are FLOPs of one decoded token at a context of 1K and 1M tokens; more: openm1 plan.
    """
    from dataclasses import asdict

    from openm1.model.config import PRESETS
    from openm1.model.size import model_size
    from openm1.planner.flops import decode_flops, total_flops
    from openm1.planner.models import from_m1

    # "nano" is a shipped model as well, with a config of its own beside its weights.
    if model in PRESETS and model != "nano":
        config = PRESETS[model]
    else:
        from openm1.model.hf import read_config

        config = read_config(model)
    size = asdict(model_size(config))
    shape = from_m1(config, model)
    for name, context in (("1k", 1024), ("1m", 1024**2)):
        flops = total_flops(decode_flops(shape, 1, past_tokens=context - 1))
        size[f"decode_flops_at_{name}"] = flops
    if json_:
        print(json.dumps(size))
        return
    for name, value in size.items():
        print(f"{name:<26}{value:>20,}")


def generate(
    prompt: Positional[tuple[str, ...]] = (),
    *,
    model: str = "nano",
    dtype: Dtype = "float32",
    weights: Weights = "full",
    prompt_file: UseAppendAction[tuple[Path, ...]] = (),
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    n: int = 1,
    stop: UseAppendAction[tuple[str, ...]] = (),
    ignore_eos: bool = False,
    no_thinking: bool = False,
    thinking_budget: int | None = None,
    thinking_grace: int | None = None,
    repetition_stop_tokens: int = 3000,
    repetition_stop_probability: float = 0.99,
    memory_budget: str | None = None,
    kernels: Kernels = "auto",
    json_: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Continues one or more prompts as they stand, without a chat template.

    Prompts in files come after those on the command line. --memory-budget is a size like 4GiB.
    """
    from dataclasses import asdict

    from openm1.cli.progress import ProgressDisplay
    from openm1.engine.llm import LLM
    from openm1.types import SamplingParams

    prompts = [*prompt, *(file.read_text() for file in prompt_file)]
    if not prompts:
        raise ValueError("generate needs at least one prompt")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        n=n,
        stop=stop,
        ignore_eos=ignore_eos,
        thinking=not no_thinking,
        thinking_budget=thinking_budget,
        thinking_grace=thinking_grace,
        repetition_stop_tokens=repetition_stop_tokens,
        repetition_stop_probability=repetition_stop_probability,
    )
    llm = LLM(model, dtype=dtype, weights=weights, config=_engine_config(memory_budget, kernels))
    if llm.int8_report is not None:
        print(llm.int8_report, file=sys.stderr)
    with ProgressDisplay() as display:
        groups = llm.generate(prompts, params, on_progress=display)
    if json_:
        print(json.dumps([[asdict(c) for c in group] for group in groups]))
        return
    # A prompt from a file may be a book; only what follows it is printed.
    shown = [*prompt, *("" for _ in prompt_file)]
    for text, group in zip(shown, groups, strict=True):
        for completion in group:
            thought = (
                "" if completion.reasoning is None else f"<think>{completion.reasoning}</think>"
            )
            print(f"{text}{thought}{completion.text}")


def chat(
    question: Positional[str] = "",
    *,
    model: str = "nano",
    dtype: Dtype = "float32",
    weights: Weights = "full",
    prompt_file: Path | None = None,
    system: str = "",
    max_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int | None = None,
    no_thinking: bool = False,
    thinking_budget: int | None = None,
    thinking_grace: int | None = None,
    repetition_stop_tokens: int = 3000,
    repetition_stop_probability: float = 0.99,
    memory_budget: str | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Talks with a model, its thought visible. With a question it answers that and ends.

    --prompt-file holds a question, put before one on the command line. --memory-budget is a size
    like 4GiB.
    """
    from openm1.cli.chat import run_chat
    from openm1.engine.llm import LLM
    from openm1.types import SamplingParams

    if prompt_file is not None:
        question = "\n\n".join(part for part in (prompt_file.read_text(), question) if part)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        thinking=not no_thinking,
        thinking_budget=thinking_budget,
        thinking_grace=thinking_grace,
        repetition_stop_tokens=repetition_stop_tokens,
        repetition_stop_probability=repetition_stop_probability,
    )
    llm = LLM(model, dtype=dtype, weights=weights, config=_engine_config(memory_budget, kernels))
    if llm.int8_report is not None:
        print(llm.int8_report, file=sys.stderr)
    run_chat(llm, params, system=system, question=question)


def _engine_config(memory_budget: str | None, kernels: Kernels) -> EngineConfig:
    from openm1.common.units import parse_bytes
    from openm1.engine.config import EngineConfig

    budget = None if memory_budget is None else parse_bytes(memory_budget)
    return EngineConfig(memory_budget_bytes=budget, kernels=kernels)


def convert(
    model: Positional[str],
    target: Positional[Path],
    *,
    layout: Literal["published", "transformers", "gguf"] = "published",
    dtype: Dtype | Literal["q8_0"] = "float32",
) -> None:
    """Rewrites a checkpoint in another layout or dtype, or as a .gguf file for llama.cpp.

    .gguf files of Llama type and of M1 can be read; q8_0 is for layout gguf.
    """
    from openm1.engine.llm import load_tokenizer
    from openm1.model.gguf_export import save_gguf
    from openm1.model.m1 import M1ForCausalLM

    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ValueError(f"{target} exists and is not empty; give a new folder")
    quantization = "q8_0" if dtype == "q8_0" else None
    if quantization and layout != "gguf":
        raise ValueError(f"dtype is 'q8_0' and layout {layout!r}; allowed is layout 'gguf'")
    source = M1ForCausalLM.from_pretrained(model, dtype="float32" if quantization else dtype)
    tokenizer = load_tokenizer(model)
    if layout == "gguf":
        notes = save_gguf(source, target, tokenizer=tokenizer, quantization=quantization)
        for note in notes:
            print(f"note: {note}")
    else:
        source.save_pretrained(target, layout=layout)
        rotated, width = source.config.rotary_dim, source.config.head_dim
        if layout == "transformers" and rotated < width:
            print(
                f"note: transformers loads it but rotates whole heads of {width} where the model "
                f"rotates {rotated}: its replies there are not the model's"
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
    print(f"wrote {target}")


def bench(
    *,
    model: str = "nano",
    dtype: Dtype = "float32",
    weights: Weights = "full",
    contexts: tuple[int, ...] = (1024, 4096),
    batches: tuple[int, ...] = (1, 8, 32),
    num_tokens: int = 16,
    repeats: int = 5,
    memory_budget: str | None = None,
    kernels: Kernels = "auto",
    json_: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Tokens per second of a model on this machine; against other engines: `make bench`."""
    from openm1.cli.bench import run_bench
    from openm1.engine.llm import LLM

    for name, values in (("contexts", contexts), ("batches", batches)):
        if not values or min(values) < 1:
            raise ValueError(f"{name} are {values}; allowed are integers of at least 1")
    if min(num_tokens, repeats) < 1:
        raise ValueError(f"num_tokens is {num_tokens}, repeats {repeats}; allowed is at least 1")
    llm = LLM(model, dtype=dtype, weights=weights, config=_engine_config(memory_budget, kernels))
    if llm.int8_report is not None:
        print(llm.int8_report, file=sys.stderr)
    run_bench(
        llm,
        contexts=contexts,
        batches=batches,
        num_tokens=num_tokens,
        repeats=repeats,
        as_json=json_,
    )


def evaluate(
    *,
    model: str = "nano",
    tasks: str | None = None,
    num_samples: int = 100,
    seed: int = 0,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    thinking_budget: int | None = None,
    json_: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Accuracy on held-out tasks; --tasks a,b names families, else those of the model's card."""
    from openm1.engine.llm import LLM
    from openm1.evals.metrics import EvaluationError
    from openm1.evals.report import eval_json, eval_table
    from openm1.evals.run import EvalConfig
    from openm1.evals.run import evaluate as run
    from openm1.recipes.card import read_card

    names = (
        tuple(t.strip() for t in tasks.split(",")) if tasks else tuple(read_card(model).families)
    )
    config = EvalConfig(
        tasks=names,
        num_samples=num_samples,
        seed=seed,
        max_tokens=max_tokens,
        temperature=temperature,
        thinking_budget=thinking_budget,
    )
    llm = LLM(model)
    try:
        results = run(llm.policy, llm.chat_format, config)
    except EvaluationError as error:
        sys.exit(f"openm1: {error}")
    if json_:
        about = {"model": model, "seed": seed, "temperature": temperature}
        print(json.dumps(eval_json(results, thinking_budget=thinking_budget, **about)))
        return
    from rich.console import Console

    Console().print(eval_table(results, f"{model}, seed {seed}"))


def demo(*, folder: Path = Path("runs/demo"), open_report: bool = False) -> None:
    """Pretraining, cold start and CISPO of a nano model in view, then the shipped one answers."""
    from openm1.recipes.demo import run_demo

    run_demo(folder, open_report=open_report)


def train(recipe: Positional[str], *, folder: Path | None = None, share: float = 1.0) -> None:
    """All stages of a recipe, chain or nano, in order; stopped and called again it goes on.

    --share 0.01 does a hundredth of the steps, to try it out. Without --folder it is the recipe's
    own, under runs/. On several cores: torchrun --nproc-per-node 2 .venv/bin/openm1 train.
    """
    from openm1.recipes.catalog import run_recipe
    from openm1.train.parallel import Processes

    checkpoint = run_recipe(recipe, folder, share)
    if Processes.joined().is_first:
        print(f"wrote {checkpoint}")


def train_stage(kind: str, args: Sequence[str]) -> None:
    """`openm1 drill|pretrain|multiturn|sft|rl RECIPE [--overrides]`."""
    from openm1.recipes.catalog import RECIPES, recipe_stage
    from openm1.recipes.runs import RLRun, run_rl, run_supervised

    if args and args[0] in ("-h", "--help"):
        print(f"usage: openm1 {kind} RECIPE [--help] [--overrides]\nrecipes: {', '.join(RECIPES)}")
        return
    if not args or args[0].startswith("-"):
        raise ValueError(f"{kind} needs a recipe: {', '.join(RECIPES)}")
    default = recipe_stage(args[0], kind)
    run = tyro.cli(
        type(default),
        default=default,
        args=args[1:],
        prog=f"openm1 {kind} {args[0]}",
        config=TYRO_CONFIG,
    )
    checkpoint = run_rl(run, kind) if isinstance(run, RLRun) else run_supervised(run, kind)
    print(f"wrote {checkpoint}")


def report(
    run: Positional[Path],
    *,
    out: Path | None = None,
    steps: tuple[int, ...] = (),
    max_groups: int = 6,
    max_rollouts: int = 8,
    open_: Annotated[bool, arg(name="open")] = False,
) -> None:
    """A run of `openm1 rl`, finished or not, as one HTML page: curves, windows, rollouts to read.

    It is written to RUN/report.html, or to --out. --steps are those whose rollouts are shown,
    --max-groups prompts each with --max-rollouts replies; --open shows the page in a browser.
    """
    from openm1.rl.report import ReportConfig, write_report

    target = out or run / "report.html"
    config = ReportConfig(steps=steps, max_groups=max_groups, max_rollouts=max_rollouts)
    write_report(run, target, config)
    print(f"wrote {target}")
    if open_:
        import webbrowser

        webbrowser.open(target.resolve().as_uri())


def serve(
    *,
    model: str = "nano",
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Dtype = "float32",
    weights: Weights = "full",
    context: int | None = None,
    thinking_budget: int | None = None,
    default_max_tokens: int = 8192,
    max_running: int = 256,
    max_queued: int = 1024,
    max_per_key: int | None = None,
    api_keys: Path | None = None,
    usage_db: str | None = None,
    drain_timeout: float = 600.0,
    log_prompts: bool = False,
    memory_budget: str | None = None,
    kernels: Kernels = "auto",
) -> None:
    """An API for OpenAI's and Anthropic's clients, and a chat page (docs/server.md).

    Keys come from --api-keys, a file of lines `NAME KEY`, or from OPENM1_API_KEY; the RL verbs need
    OPENM1_ADMIN_KEY. --name is what clients call the model; --context limits prompt and reply
    together; --max-running and --max-queued replies are written and may wait; --usage-db is an
    SQLAlchemy URL. The released models were trained for a --thinking-budget of 40000 and 80000.
    """
    import os

    from openm1.cli.needs import need_server

    need_server()
    from openm1.cli.serve import read_keys, run_serve
    from openm1.engine.llm import LLM
    from openm1.server.config import ServerConfig
    from openm1.server.usage import usage_url

    config = ServerConfig(
        host=host,
        port=port,
        api_keys=read_keys(api_keys),
        admin_key=os.environ.get("OPENM1_ADMIN_KEY"),
        max_running_requests=max_running,
        max_queued_requests=max_queued,
        max_requests_per_key=max_per_key,
        default_max_tokens=default_max_tokens,
        thinking_budget=thinking_budget,
        drain_timeout_s=drain_timeout,
        usage_url=usage_url(usage_db),
        log_prompts=log_prompts,
    )
    engine = replace(_engine_config(memory_budget, kernels), max_num_seqs=max_running)
    llm = LLM(model, dtype=dtype, weights=weights, config=engine)
    if llm.int8_report is not None:
        print(llm.int8_report, file=sys.stderr)
    run_serve(llm, name or Path(model).name, config, context_tokens=context)


def usage(
    *,
    db: str | None = None,
    since: str | None = None,
    input_prices: tuple[float, float, float] = (0.8, 1.2, 2.4),
    output_prices: tuple[float, float, float] = (8.0, 16.0, 24.0),
    currency: str = "CNY",
    json_: Annotated[bool, arg(name="json")] = False,
) -> None:
    """The bill: what each key has used of `openm1 serve`, by length of prompt.

    Prices are per million tokens in prompts of up to 32K, up to 128K and above; those given are
    what MiniMax asked when M1 came out. --since is a day, like 2026-11-01, in UTC.
    """
    from openm1.cli.needs import need_server

    need_server()
    from openm1.cli.usage import bill_json, bill_table
    from openm1.server.usage import TIERS, read_bill, usage_url

    lines = read_bill(usage_url(db), since=_day(since))
    prices = dict(zip(TIERS, zip(input_prices, output_prices, strict=True), strict=True))
    if json_:
        print(json.dumps(bill_json(lines, prices, currency)))
        return
    from rich.console import Console

    Console().print(bill_table(lines, prices, currency))


def _day(text: str | None) -> datetime | None:
    from datetime import UTC, datetime

    try:
        return None if text is None else datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise ValueError(f"since is {text!r}; allowed is a day like 2026-11-01") from None


COMMANDS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "generate": generate,
    "chat": chat,
    "convert": convert,
    "eval": evaluate,
    "report": report,
    "bench": bench,
    "serve": serve,
    "usage": usage,
    "demo": demo,
    "train": train,
}
