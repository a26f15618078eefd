"""Calculator: sums and products with a tool at hand, which is asked instead of thinking."""

from __future__ import annotations

import ast
import json
import operator
from random import Random

from openm1.envs.base import QuestionEnv, SingleTurnTaskset
from openm1.types import Message, StepResult, Task, ToolCall, ToolSpec

CALCULATOR = ToolSpec(
    name="calculator",
    description="Evaluates an arithmetic expression.",
    parameters={
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
)
MAX_EXPRESSION_CHARACTERS = 200

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The value of `+ - * / // %`, brackets and numbers, whole where it is whole.

    Raises ValueError for anything else.
    """
    if len(expression) > MAX_EXPRESSION_CHARACTERS:
        raise ValueError(f"expression has over {MAX_EXPRESSION_CHARACTERS} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"cannot evaluate {expression!r}: {error}") from error
    return str(int(value)) if value == int(value) else str(value)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"cannot evaluate {ast.unparse(node)!r}: only numbers and + - * / // % ( )")


def draw_expression(rng: Random) -> str:
    """Two to four numbers of one to six digits with `+`, `-` or `*` between them."""
    numbers = [str(rng.randrange(10 ** rng.randint(1, 6))) for _ in range(rng.randint(2, 4))]
    text = numbers[0]
    for number in numbers[1:]:
        text += rng.choice("+-**") + number
    return text


class CalculatorTaskset(SingleTurnTaskset):
    """Sums and products of numbers up to six digits, with the calculator offered."""

    name = "calculator"

    def draw(self, rng: Random) -> Task:
        expression = draw_expression(rng)
        question = Message(role="user", content=f"calculate {expression}")
        return Task(
            family=self.name,
            prompt=(question,),
            answer=calculate(expression),
            tools=(CALCULATOR,),
        )

    def think(self, task: Task) -> str:
        """Raises ValueError: these are for the tool."""
        raise ValueError("calculator has no worked thoughts; its solution is a call")

    def make_env(self, task: Task) -> QuestionEnv:
        return CalculatorEnv(self, task)


class CalculatorEnv(QuestionEnv):
    """Answers calls until the model answers the question."""

    async def step(self, reply: Message) -> StepResult:
        if not reply.tool_calls:
            return await super().step(reply)
        messages = tuple(_answer(call) for call in reply.tool_calls)
        return StepResult(reward=0.0, done=False, messages=messages)


def _answer(call: ToolCall) -> Message:
    """What the tool says; a bad call gets a sentence about it, and the model may try again."""
    try:
        arguments = json.loads(call.arguments)
        if call.name != CALCULATOR.name or set(arguments) != {"expression"}:
            raise ValueError(f"there is no {call.name}({', '.join(arguments)})")
        content = calculate(str(arguments["expression"]))
    except ValueError as error:
        content = f"error: {error}"
    return Message(role="tool", name=call.name, tool_call_id=call.id, content=content)


_QUESTIONS = (
    "what is {e}", "what's {e}", "calculate {e}", "compute {e}", "how much is {e}", "{e}", "{e} =",
    "work out {e}", "use the calculator: {e}", "evaluate {e}", "can you compute {e}",
    "i need the result of {e}", "please calculate {e}",
    "State the final answer to the following arithmetic problem: {e} =",
    "Solve the following multiplication: {e}. Give only the result as your final answer.",
)  # fmt: skip
_DESCRIPTIONS = (
    CALCULATOR.description, "", "Calculates.", "Evaluate a mathematical expression",
    "A calculator for + - * /", "Computes the value of an expression and returns it.",
    "Use this for arithmetic.",
)  # fmt: skip


def calculator_conversation(rng: Random) -> tuple[list[Message], list[ToolSpec]]:
    """A question, the call, what the tool says and the answer, with the tool that was offered."""
    expression = draw_expression(rng)
    result = calculate(expression)
    shown = expression
    if rng.random() < 0.5:
        for sign in "+-*":
            shown = shown.replace(sign, f" {sign} ")
    if rng.random() < 0.2:
        shown = shown.replace("*", "times").replace("+", "plus").replace("-", "minus")
    question = rng.choice(_QUESTIONS).format(e=shown)
    if rng.random() < 0.3:
        question = question[0].upper() + question[1:] + rng.choice(("?", "", "."))
    call = ToolCall(
        name="calculator", arguments=json.dumps({"expression": expression}), id="call_0"
    )
    tool = ToolSpec(
        name="calculator",
        description=rng.choice(_DESCRIPTIONS),
        parameters=CALCULATOR.parameters,
    )
    return [
        Message(role="user", content=question),
        Message(role="assistant", reasoning="calculator", tool_calls=(call,)),
        Message(role="tool", name="calculator", tool_call_id="call_0", content=result),
        Message(role="assistant", reasoning="", content=result),
    ], [tool]
