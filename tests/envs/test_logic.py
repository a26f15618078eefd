"""Worked thoughts are parsed and recomputed here, and graded by the package's own scorers."""

import math
import random
import re
from itertools import islice, pairwise

import pytest
import reasoning_gym

from openm1.envs.base import prompt_text
from openm1.envs.logic import (
    COUNT_WORDS,
    LOGIC_PHRASES,
    THOUGHTS,
    LogicTaskset,
    think_chain_sum,
    think_count_bits,
    think_gcd,
    think_letter_counting,
    think_spell_backward,
)

NUM_ITEMS = 300


def conclusion_of(name: str, thought: str) -> str:
    """The answer as a reader would take it from the thought alone."""
    if name in ("count_bits", "letter_counting"):
        return re.findall(r"\((\d+)\)", thought)[-1]
    if name == "spell_backward":
        return re.sub(r"\d", "", thought.split("\n")[1])
    if name == "chain_sum":
        return thought.rsplit("=", 1)[1]
    return thought.rsplit("\n", 1)[1].split(",")[0]


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_lead_to_what_the_package_scores_as_right(name):
    taskset = LogicTaskset(name)
    scorer = reasoning_gym.create_dataset(name, seed=1, size=1)
    for task in islice(taskset.train(0), NUM_ITEMS):
        answer = conclusion_of(name, taskset.think(task))
        entry = {
            "question": prompt_text(task),
            "answer": task.answer,
            "metadata": dict(task.metadata),
        }
        assert scorer.score_answer(answer, entry) == 1
        assert answer == taskset.solution(task, random.Random(0)).content


@pytest.mark.parametrize("name", THOUGHTS)
def test_prompts_are_the_packages_own_and_fill_its_phrases(name):
    package = {item["question"] for item in reasoning_gym.create_dataset(name, seed=7, size=20)}
    pattern = ".+?".join(map(re.escape, LOGIC_PHRASES[name]))
    if name == "spell_backward":
        pattern += r"\w+"
    ours = {prompt_text(task) for task in LogicTaskset(name).test(0, 20)}
    for prompt in package | ours:
        assert re.fullmatch(pattern, prompt)


@pytest.mark.parametrize("name", THOUGHTS)
def test_fragments_and_unreadable_text_earn_nothing(name):
    taskset = LogicTaskset(name)
    for task in islice(taskset.train(1), 50):
        fragments = (
            task.answer[:-1],
            f"{task.answer} {task.answer}",
            f"it is {task.answer}",
            "1e",
            "--",
            "nan",
        )
        assert [taskset.grade(task, text) for text in fragments] == [0.0] * len(fragments)


@pytest.mark.parametrize("base", [2, 4, 8, 16])
def test_count_bits_divides_down_and_counts(base):
    rng = random.Random(base)
    for number in [1, 2, base, 2**31 - 1] + [rng.randint(1, 2**31 - 1) for _ in range(100)]:
        rows = re.findall(r"(\d+)\((\d+)\)", think_count_bits(number, base))
        values = [int(value) for value, _ in rows] + [0]
        assert values[0] == number
        for (high, low), (_, count) in zip(pairwise(values), rows, strict=True):
            assert high // base == low
            assert int(count) == bin(number).count("1") - bin(low).count("1")
    with pytest.raises(ValueError, match="base is 10"):
        think_count_bits(5, 10)


def test_quotient_digits_are_local_as_the_docstring_says():
    rng = random.Random(0)
    for power in (1, 2, 3, 4):
        for _ in range(200):
            number = rng.randint(10**9, 2**31 - 1)
            digits, quotient = str(number), str(number // 2**power).zfill(10)
            for place in range(power, 10):
                window = int(digits[place - power : place + 1])
                assert int(quotient[place]) == window // 2**power % 10


def test_spelling_counts_up_then_down():
    assert think_spell_backward("sun") == "0s1u2n\n2n1u0s"


def test_letters_are_marked_and_summed_at_word_ends():
    assert think_letter_counting("a", ["Anna", "ran"]) == "A+nna+(2)ra+n(3)"
    taskset = LogicTaskset("letter_counting")
    for task in islice(taskset.train(2), 100):
        thought = taskset.think(task)
        copied = re.sub(r"\(\d+\)", " ", thought).replace("+", "").strip()
        assert f'"{copied}"' in prompt_text(task)
        running = [int(count) for count in re.findall(r"\((\d+)\)", thought)]
        marks = [part.count("+") for part in re.split(r"\(\d+\)", thought)]
        assert [sum(marks[: place + 1]) for place in range(len(running))] == running


def check_column_line(line: str) -> None:
    """`a op b [<> c op d] : backwards = result` must hold in each of its parts."""
    head, result = line.rsplit("=", 1)
    operations, backwards = head.split(":")
    original, *rewritten = re.split("[<>]", operations)
    assert eval(re.sub(r"\b0+(?=\d)", "", original)) == int(result)
    assert int(backwards[::-1]) == abs(int(result))
    if rewritten:
        assert eval(rewritten[0]) == abs(int(result))
        assert ("<" in operations) == (int(result) < 0)
        assert not rewritten[0].startswith("-")
    else:
        assert int(result) >= 0 and not original.startswith("-")


def test_sums_hold_line_by_line_with_every_pairing_of_signs():
    assert think_chain_sum("347 + 85") == "347+85:234=432"
    assert think_chain_sum("12 - 30 + 5 - 5 + 30") == (
        "12-30<30-12:81=-18\n-18+5<18-5:31=-13\n-13-5<13+5:81=-18\n-18+30>30-18:21=12"
    )
    for left in range(-12, 13):
        for right in range(13):
            for sign in "+-":
                expression = (
                    f"0 + {left} {sign} {right}" if left >= 0 else (f"0 - {-left} {sign} {right}")
                )
                *_, line = think_chain_sum(expression).split("\n")
                check_column_line(line)
    for task in islice(LogicTaskset("chain_sum").train(3), 200):
        lines = LogicTaskset("chain_sum").think(task).split("\n")
        for line in lines:
            check_column_line(line)
        for line, following in pairwise(lines):
            assert following.startswith(line.rsplit("=", 1)[1])
    with pytest.raises(ValueError, match="terms of 0 or more"):
        think_chain_sum("5 + -3")


def test_euclid_holds_line_by_line():
    rng = random.Random(0)
    for _ in range(200):
        left, right = rng.randint(1, 1000), rng.randint(1, 1000)
        thought = think_gcd(left, right)
        pairs = [tuple(map(int, line.split(","))) for line in thought.split("\n") if "," in line]
        assert set(pairs[0]) == {left, right}
        assert all(pair[0] >= pair[1] for pair in pairs)
        assert all(low == high % middle for (high, middle), (_, low) in pairwise(pairs))
        assert pairs[-1] == (math.gcd(left, right), 0)
        for line in thought.split("\n"):
            if "," not in line:
                check_column_line(line)


def test_options_reach_the_package():
    tasks = LogicTaskset("chain_sum", max_terms=2, max_digits=1).test(0, 5)
    assert all(re.search(r": \d [+-] \d =$", prompt_text(task)) for task in tasks)
    with pytest.raises(ValueError, match="logic family is 'maze'; allowed are count_bits"):
        LogicTaskset("maze")


def test_running_counts_are_words():
    counts = {f"({count})" for count in range(32)}
    assert set(COUNT_WORDS) == counts and len(COUNT_WORDS) == 32
    for task in LogicTaskset("count_bits").test(0, 20):
        assert set(re.findall(r"\(\d+\)", think_count_bits(int(task.metadata["number"])))) <= counts
