"""Worked arithmetic: columns from right to left, long products, long division, trial division.

Every column is written out before the result, so that what follows is always a fact about the last
few tokens: `347+85:75(12)48(13)30(4)=432` adds 7 and 5, then 4, 8 and the carry, then 3 and it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd


def _column_step(left: int, sign: str, right: int) -> str:
    """`347+85:75(12)48(13)30(4)`: two digits, and in brackets what comes of them and the column
    before.

    Its last digit is the result's. A sum carries where it is 10 or more; a difference is written
    with 10 added, `347-85:75(12)48(6)30(12)`, and borrows where it is below 10.
    """
    top, bottom = str(left)[::-1], str(right)[::-1]
    result = left + right if sign == "+" else left - right
    width = max(len(top), len(bottom), len(str(result)))
    columns, moved = [], 0
    for up, down in zip(top.ljust(width, "0"), bottom.ljust(width, "0"), strict=True):
        if sign == "+":
            value = int(up) + int(down) + moved
            moved = value // 10
        else:
            value = int(up) - int(down) - moved + 10
            moved = int(value < 10)
        columns.append(f"{up}{down}({value})")
    return f"{left}{sign}{right}:{''.join(columns)}"


def _product_step(left: int, part: int) -> str:
    """`562*900:00291869555950`: the zeros of `part`, then for each digit of `left` it, the digit of
    `part` and the two digits of their product with the carry before it."""
    digit = int(str(part)[0])
    columns, carry = ["0" * (len(str(part)) - 1)], 0
    for up in str(left)[::-1]:
        value = int(up) * digit + carry
        carry = value // 10
        columns.append(f"{up}{digit}{value:02d}")
    return f"{left}*{part}:{''.join(columns)}"


def _signed_step(left: int, sign: str, right: int) -> str:
    """One line of a running sum, `_column_step`=result, or rewritten first if a number is negative.

    `12-30<30-12:..=-18` and `-18+30>30-18:..=12`: what follows `<` is the size of a negative
    result, what follows `>` that of a positive one, as an operation on two positive numbers.
    """
    result = left + right if sign == "+" else left - right
    if left >= 0 and result >= 0:
        return f"{_column_step(left, sign, right)}={result}"
    size, other = abs(left), right
    inner_sign = "+" if (left < 0) == (sign == "-") else "-"
    if inner_sign == "-" and size < other:
        size, other = other, size
    mark = "<" if result < 0 else ">"
    return f"{left}{sign}{right}{mark}{_column_step(size, inner_sign, other)}={result}"


def think_chain_sum(expression: str) -> str:
    """Running sums from left to right, one line each. Terms must not carry signs of their own."""
    first, *rest = expression.split()
    if not all(term.isdigit() for term in (first, *rest[1::2])):
        raise ValueError(f"expression is {expression!r}; allowed are terms of 0 or more")
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        lines.append(_signed_step(total, sign, int(term)))
        total = total + int(term) if sign == "+" else total - int(term)
    return "\n".join(lines)


def _product_lines(left: int, right: int) -> list[str]:
    """A line for each digit of `right` that is not 0, and their sums."""
    if right == 0:
        return [f"{left}*0=0"]
    lines: list[str] = []
    total = 0
    for place, digit in enumerate(str(right)):
        if digit == "0":
            continue
        part = int(digit) * 10 ** (len(str(right)) - 1 - place)
        product = left * part
        lines.append(f"{_product_step(left, part)}={product}")
        if total:
            lines.append(f"{_column_step(total, '+', product)}={total + product}")
        total += product
    return lines


def _division_lines(dividend: int, divisor: int) -> list[str]:
    """Long division: per digit of the quotient that is not 0 a product and a subtraction."""
    lines, rest, quotient = [], dividend, str(dividend // divisor)
    for place, digit in enumerate(quotient):
        if digit == "0":
            continue
        part = int(digit) * 10 ** (len(quotient) - 1 - place)
        product = divisor * part
        if part > 1:
            lines.append(f"{_product_step(divisor, part)}={product}")
        lines.append(f"{_column_step(rest, '-', product)}={rest - product}")
        rest -= product
    return lines


def _euclid_lines(left: int, right: int) -> list[str]:
    """Each pair on a line of its own, long division between two pairs, to a pair with 0 or 1."""
    larger, smaller = max(left, right), min(left, right)
    lines = [f"{larger},{smaller}"]
    while smaller > 1:
        lines += _division_lines(larger, smaller)
        larger, smaller = smaller, larger % smaller
        lines.append(f"{larger},{smaller}")
    return lines


def think_gcd(left: int, right: int) -> str:
    """Euclid's algorithm. The last pair is the answer and 0, or anything and 1."""
    return "\n".join(_euclid_lines(left, right))


def think_lcm(left: int, right: int) -> str:
    """Euclid's algorithm, then the smaller number divided by what was found, times the larger."""
    larger, smaller = max(left, right), min(left, right)
    common = gcd(left, right)
    quotient = smaller // common
    lines = _euclid_lines(left, right)
    if common > 1:
        lines += [f"{smaller}/{common}", *_division_lines(smaller, common)]
    lines += [f"{larger}*{quotient}", *_product_lines(larger, quotient)]
    return "\n".join(lines)


def think_products(left: int, right: int) -> str:
    """Long multiplication: a line for each digit of the second factor, and the running sums."""
    return "\n".join([f"{left}*{right}", *_product_lines(left, right)])


def think_prime_factorization(number: int) -> str:
    """Trial division, one prime a line: `639/3:62(0)31(0)93(0)=213`, until the prime squared is too
    large.

    For each digit: it, the quotient's digit, and in brackets what remains; the quotient follows
    where nothing remains at the end. A last line `71.` says that what is left is prime.
    """
    lines, prime = [], 2
    while prime * prime <= number:
        columns, rest = [], 0
        for digit in str(number):
            quotient, rest = divmod(10 * rest + int(digit), prime)
            columns.append(f"{digit}{quotient}({rest})")
        line = f"{number}/{prime}:{''.join(columns)}"
        if rest == 0:
            number //= prime
            lines.append(f"{line}={number}")
        else:
            lines.append(line)
            prime = next(p for p in range(prime + 1, prime * prime + 2) if _is_prime(p))
    return "\n".join([*lines, f"{number}."])


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def think_leg_counting(animals: Sequence[tuple[int, str, int]]) -> str:
    """From (how many, name, legs): `3 crab 3*10=30 48+30:80(8)43(7)=78`, with the sum so far."""
    lines, total = [], 0
    for count, name, legs in animals:
        product = count * legs
        line = f"{count} {name} {count}*{legs}={product}"
        step = _column_step(total, "+", product) if product else ""
        lines.append(f"{line} {step}={total + product}")
        total += product
    return "\n".join(lines)


def think_simple_geometry(num_sides: int, angles: Sequence[int]) -> str:
    """`5 540`, what the angles of a pentagon sum to, then each known angle taken off."""
    rest = 180 * (num_sides - 2)
    lines = [f"{num_sides} {rest}"]
    for angle in angles:
        lines.append(f"{_column_step(rest, '-', angle)}={rest - angle}")
        rest -= angle
    return "\n".join(lines)


def think_simple_equations(factor: int, constant: int, value: int) -> str:
    """factor * x + constant = value: the constant to the other side, then long division.

    `84x=9410-4370`, the subtraction, `5040/84` and its division. A negative factor changes all
    signs first.
    """
    if factor < 0:
        factor, constant, value = -factor, -constant, -value
    lines = []
    if constant:
        sign = "-" if constant > 0 else "+"
        lines += [f"{factor}x={value}{sign}{abs(constant)}"]
        lines += [_signed_step(value, sign, abs(constant))]
    product = value - constant
    return "\n".join([*lines, f"{product}/{factor}", *_division_lines(product, factor)])


def think_complex_arithmetic(
    left: tuple[int, int], operation: str, right: tuple[int, int], result: tuple[int, int]
) -> str:
    """The real part on one line and the imaginary part on the next.

    `-5+3=-2` for sums and differences. A product's part is two products and their difference or
    sum; a quotient is checked by multiplying back, so it is only stated.
    """
    (a, b), (c, d) = left, right
    if operation in "+-":
        return f"{_fact(a, operation, c)}\n{_fact(b, operation, d)}"
    if operation == "×":
        return (
            f"{_fact(a, '*', c)} {_fact(b, '*', d)} {_fact(a * c, '-', b * d)}\n"
            f"{_fact(a, '*', d)} {_fact(b, '*', c)} {_fact(a * d, '+', b * c)}"
        )
    e, f = result
    return (
        f"{e} {f}\n{_fact(e, '*', c)} {_fact(f, '*', d)} {_fact(e * c, '-', f * d)}\n"
        f"{_fact(e, '*', d)} {_fact(f, '*', c)} {_fact(e * d, '+', f * c)}"
    )


def _fact(left: int, sign: str, right: int) -> str:
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return f"{left}{sign}{right}={result}"
