"""Worked thoughts are parsed and recomputed here, and graded by the package's own scorers."""

import math
import random
import re
from itertools import islice, pairwise

import pytest
import reasoning_gym

from openm1.envs.base import prompt_text
from openm1.envs.logic import EASIER, REDUCED, THOUGHTS, LogicTaskset, read_equation
from openm1.envs.phrases import LOGIC_PHRASES
from openm1.envs.thoughts.letters import (
    COUNT_WORDS,
    think_count_bits,
    think_letter_counting,
    think_spell_backward,
    think_word_sequence_reversal,
)
from openm1.envs.thoughts.numbers import (
    think_chain_sum,
    think_complex_arithmetic,
    think_gcd,
    think_lcm,
    think_leg_counting,
    think_prime_factorization,
    think_products,
    think_simple_equations,
    think_simple_geometry,
)
from openm1.envs.thoughts.relations import (
    FEMALE_RELATIONS,
    MALE_RELATIONS,
    think_family_relationships,
    think_syllogism,
)

NUM_ITEMS = 300

WAYS = {
    "": ("sister", "brother"),
    "<": ("mother", "father"),
    ">": ("daughter", "son"),
    "=": ("wife", "husband"),
    "<>": ("sister", "brother"),
    "<<": ("grandmother", "grandfather"),
    "<<>": ("aunt", "uncle"),
    "<>>": ("niece", "nephew"),
    ">=": ("mother-in-law", "father-in-law"),
}
"""What a way from one person to another is called by the package, women first."""


def conclusion_of(name: str, thought: str) -> str:
    """The answer as a reader would take it from the thought alone."""
    return CONCLUSIONS[name](thought)


def _last_sum(thought: str) -> str:
    return thought.rsplit("=", 1)[1]


def _common_divisor(thought: str) -> str:
    larger, smaller = thought.rsplit("\n", 1)[1].split(",")
    return smaller if smaller == "1" else larger


def _factors(thought: str) -> str:
    lines = thought.split("\n")
    primes = [re.search(r"/(\d+)", line)[1] for line in lines if "=" in line]
    last = [lines[-1].rstrip(".")]
    return " × ".join(primes + [number for number in last if number != "1"])


def _quotient(thought: str) -> str:
    dividend, divisor = map(int, re.search(r"(?m)^(\d+)/(\d+)$", thought).groups())
    parts = re.findall(rf"(?m)^{divisor}\*(\d+):", thought.split(f"{dividend}/{divisor}\n")[1])
    # A part of 1 has no line of its own.
    rest = dividend - divisor * sum(map(int, parts))
    assert rest in (0, divisor)
    return str(sum(map(int, parts)) + rest // divisor)


def _complex(thought: str) -> str:
    first, second, *_ = thought.split("\n")
    if "=" in first:
        real, imaginary = int(_last_sum(first)), int(_last_sum(second))
    else:
        real, imaginary = map(int, first.split())
    return f"{real}+{imaginary}i" if imaginary >= 0 else f"{real}{imaginary}i"


def _relation(thought: str) -> str:
    women, men = WAYS["".join(re.findall("[<>=]", thought))]
    return women if thought.endswith(" female") else men


CONCLUSIONS = {
    "count_bits": lambda thought: re.findall(r"\((\d+)\)", thought)[-1],
    "letter_counting": lambda thought: re.findall(r"\((\d+)\)", thought)[-1],
    "spell_backward": lambda thought: re.sub(r"\d", "", thought.split("\n")[1]),
    "word_sequence_reversal": lambda thought: ", ".join(
        word[1:] for word in thought.split("\n")[1].split(" ")
    ),
    "chain_sum": _last_sum,
    "products": _last_sum,
    "lcm": _last_sum,
    "leg_counting": _last_sum,
    "simple_geometry": _last_sum,
    "aiw": _last_sum,
    "gcd": _common_divisor,
    "prime_factorization": _factors,
    "simple_equations": _quotient,
    "complex_arithmetic": _complex,
    "family_relationships": _relation,
}
"""All but syllogism, whose thought restates the question and leaves the conclusion to memory."""


@pytest.mark.parametrize("name", CONCLUSIONS)
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
        # Complex numbers are scored by value, in whatever way they are written.
        if name != "complex_arithmetic":
            assert answer == taskset.solution(task, random.Random(0)).content


@pytest.mark.parametrize("name", THOUGHTS)
def test_prompts_are_the_packages_own_and_use_all_its_phrases(name):
    package = reasoning_gym.create_dataset(name, seed=7, size=NUM_ITEMS, **REDUCED.get(name, {}))
    prompts = [item["question"] for item in package]
    assert [phrase for phrase in LOGIC_PHRASES[name] if not any(phrase in p for p in prompts)] == []
    ours = [prompt_text(task) for task in LogicTaskset(name).test(0, 20)]
    first = [phrase for phrase in LOGIC_PHRASES[name] if any(p.startswith(phrase) for p in prompts)]
    assert all(any(p.startswith(phrase) for phrase in first) for p in ours) or not first


@pytest.mark.parametrize("name", THOUGHTS)
def test_fragments_and_unreadable_text_earn_nothing(name):
    taskset = LogicTaskset(name)
    for task in islice(taskset.train(1), 50):
        fragments = (
            # 5.00 without its last digit is still five.
            task.answer[:-1] if name != "complex_arithmetic" else "",
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
    """`a op b [<> c op d] : columns = result` must hold in each of its parts."""
    head, result = line.rsplit("=", 1)
    operations, columns = head.split(":")
    original, *rewritten = re.split("[<>]", operations)
    assert eval(original) == int(result)
    if rewritten:
        assert eval(rewritten[0]) == abs(int(result))
        assert ("<" in operations) == (int(result) < 0)
        assert not rewritten[0].startswith("-")
    else:
        assert int(result) >= 0 and not original.startswith("-")
    check_columns(rewritten[0] if rewritten else original, columns)


def check_columns(operation: str, columns: str) -> None:
    """Each column is about the next digits of both numbers, and they add up to the result."""
    left, sign, right = re.fullmatch(r"(\d+)([-+*])(\d+)", operation).groups()
    if sign == "*":
        zeros = len(right) - 1
        assert columns[:zeros] == "0" * zeros == right[1:]
        groups = re.findall(r"(\d)(\d)(\d)(\d)", columns[zeros:])
        assert "".join(map("".join, groups)) == columns[zeros:]
        assert "".join(up for up, *_ in groups) == left[::-1]
        assert {digit for _, digit, *_ in groups} == {right[0]}
        digits = "".join(low for *_, low in groups)[::-1]
        assert int(groups[-1][2] + digits + "0" * zeros) == eval(operation)
        carries = [0, *(int(high) for *_, high, _ in groups)]
        for carry, (up, digit, high, low) in zip(carries, groups, strict=False):
            assert int(up) * int(digit) + carry == int(high + low)
        return
    groups = re.findall(r"(\d)(\d)\((\d+)\)", columns)
    assert "".join(f"{up}{down}({value})" for up, down, value in groups) == columns
    assert int("".join(up for up, *_ in groups)[::-1]) == int(left)
    assert int("".join(down for _, down, _ in groups)[::-1]) == int(right)
    assert int("".join(value[-1] for *_, value in groups)[::-1]) == eval(operation)
    moved = 0
    for up, down, value in groups:
        if sign == "+":
            assert int(value) == int(up) + int(down) + moved
            moved = int(int(value) >= 10)
        else:
            assert int(value) == 10 + int(up) - int(down) - moved
            moved = int(int(value) < 10)
        assert f"({value})" in COUNT_WORDS


def test_sums_hold_line_by_line_with_every_pairing_of_signs():
    assert think_chain_sum("347 + 85") == "347+85:75(12)48(13)30(4)=432"
    assert think_chain_sum("347 - 85") == "347-85:75(12)48(6)30(12)=262"
    assert think_chain_sum("12 - 30 + 5 - 5 + 30") == (
        "12-30<30-12:02(8)31(11)=-18\n-18+5<18-5:85(13)10(11)=-13\n"
        "-13-5<13+5:35(8)10(1)=-18\n-18+30>30-18:08(2)31(11)=12"
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
        divisor = math.gcd(left, right)
        assert pairs[-1] == ((pairs[-1][0], 1) if divisor == 1 < pairs[-1][0] else (divisor, 0))
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


def test_products_and_quotients_hold_line_by_line():
    assert think_products(23, 45) == (
        "23*45\n23*40:034122409=920\n23*5:35152511=115\n920+115:05(5)21(3)91(10)00(1)=1035"
    )
    assert think_products(7, 0) == "7*0\n7*0=0"
    rng = random.Random(1)
    for _ in range(200):
        left, right = rng.randint(1, 9999), rng.randint(1, 999)
        for line in think_products(left, right).split("\n")[1:]:
            check_column_line(line)
        for line in think_lcm(left, right).split("\n"):
            if ":" in line:
                check_column_line(line)
        assert think_lcm(left, right).endswith(f"={math.lcm(left, right)}")


def test_trial_division_writes_what_remains_after_each_digit():
    assert think_prime_factorization(639) == (
        "639/2:63(0)31(1)99(1)\n639/3:62(0)31(0)93(0)=213\n213/3:20(2)17(0)31(0)=71\n"
        "71/3:72(1)13(2)\n71/5:71(2)14(1)\n71/7:71(0)10(1)\n71."
    )
    for number in range(2, 1001):
        for line in think_prime_factorization(number).split("\n")[:-1]:
            dividend, prime = re.match(r"(\d+)/(\d+)", line).groups()
            columns = re.findall(r"(\d)(\d)\((\d+)\)", line)
            assert "".join(digit for digit, *_ in columns) == dividend
            assert int("".join(q for _, q, _ in columns)) == int(dividend) // int(prime)
            rests = [int(rest) for *_, rest in columns]
            assert rests == [int(dividend[: k + 1]) % int(prime) for k in range(len(dividend))]
            if rests[-1] == 0:
                assert int(line.split("=")[1]) * int(prime) == int(dividend)


def test_equations_are_read_in_every_form():
    assert read_equation("84*t + 4370 = 9410") == (84, 4370, 9410)
    assert read_equation("840*k = 10920") == (840, 0, 10920)
    assert read_equation("57 - 85*r = -1813") == (-85, 57, -1813)
    assert read_equation("w - 8 = -3") == (1, -8, -3)
    assert read_equation("7 - x = 3") == (-1, 7, 3)
    with pytest.raises(ValueError, match="one unknown"):
        read_equation("x*x = 4")
    assert think_simple_equations(-85, 57, -1813).startswith(
        "85x=1813+57\n1813+57:37(10)15(7)80(8)10(1)=1870"
    )


def test_other_thoughts_say_what_their_docstrings_say():
    assert think_word_sequence_reversal(["me", "law", "and"]) == "0me 1law 2and\n2and 1law 0me"
    assert think_simple_geometry(5, [100, 60]) == (
        "5 540\n540-100:00(10)40(14)51(14)=440\n440-60:00(10)46(8)40(13)=380"
    )
    assert think_leg_counting([(3, "crab", 10), (2, "snake", 0)]) == (
        "3 crab 3*10=30 0+30:00(0)03(3)=30\n2 snake 2*0=0 =30"
    )
    assert think_complex_arithmetic((1, 2), "×", (3, 4), (-5, 10)) == (
        "1*3=3 2*4=8 3-8=-5\n1*4=4 2*3=6 4+6=10"
    )
    assert think_complex_arithmetic((-5, 10), "÷", (3, 4), (1, 2)) == (
        "1 2\n1*3=3 2*4=8 3-8=-5\n1*4=4 2*3=6 4+6=10"
    )
    story = "Ann is married to Bo. They have a child called Cy. They have children called A and B."
    assert think_family_relationships(story, "Bo", "Cy", "male") == " Cy< Bo male"
    metadata = {
        "premise1": "All dogs are cats",
        "premise2": "Some cats are not bees",
        "conclusion": "No dogs are bees",
    }
    assert think_syllogism(metadata) == ("A dogs B cats C bees\nAll A B\nSome B not C\nNo A C")
    assert set(FEMALE_RELATIONS) | set(MALE_RELATIONS) == {
        n for pair in WAYS.values() for n in pair
    }


def test_syllogisms_in_letters_leave_nothing_open():
    """The same letters never have two answers: else no thought of this kind could be enough."""
    taskset, answers = LogicTaskset("syllogism"), {}
    for task in islice(taskset.train(0), 3000):
        form = taskset.think(task).split("\n", 1)[1]
        answers.setdefault(form, set()).add(task.answer)
    assert len(answers) > 150
    assert max(map(len, answers.values())) == 1


@pytest.mark.parametrize("name", EASIER)
def test_easier_items_are_the_same_kind_of_task_and_shorter(name):
    easier, whole = LogicTaskset(name, **EASIER[name]), LogicTaskset(name)

    def mean_length(taskset: LogicTaskset) -> float:
        return sum(len(taskset.think(task)) for task in islice(taskset.train(0), 100)) / 100

    assert mean_length(easier) < mean_length(whole)
    for task in islice(easier.train(1), 20):
        easier.validate(task)


def test_what_is_not_a_number_earns_nothing():
    # The package's own scorer pays in full for it.
    taskset = LogicTaskset("complex_arithmetic")
    task = taskset.test(0, 1)[0]
    for text in ("nan", "inf", "nan + 1i", "-inf"):
        assert taskset.grade(task, text) == 0.0
