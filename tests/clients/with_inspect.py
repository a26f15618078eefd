"""inspect-ai against a server: an evaluation with a score, and one whose model must call a tool."""

import os
import sys
import tempfile

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import match
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

BASE = sys.argv[1]
SAMPLES = [("4 -9 +8 *9 +1", "8"), ("6 -9 -4 -6", "7"), ("3 +6 *9 +3 -8 +0 *7", "2")]
CONFIG = GenerateConfig(temperature=0, max_tokens=256, seed=1)


@tool
def look():
    async def execute(where: int) -> str:
        """Looks somewhere.

        Args:
            where: Where to look.
        """
        return str(where)

    return execute


def model(name: str, base: str):
    return get_model(name, base_url=base, api_key="any", config=CONFIG)


os.chdir(tempfile.mkdtemp())
samples = [Sample(input=question, target=answer) for question, answer in SAMPLES]
for name, base in (("openai-api/openm1/nano", BASE + "/v1"), ("openai/nano", BASE + "/v1")):
    (log,) = eval(
        Task(dataset=samples, solver=generate(), scorer=match()),
        model=model(name, base),
        display="none",
    )
    assert log.status == "success", log.error
    accuracy = log.results.scores[0].metrics["accuracy"].value
    assert accuracy == 1.0, accuracy

(log,) = eval(
    Task(
        dataset=samples[:1],
        solver=[use_tools(look(), tool_choice="any"), generate(tool_calls="single")],
    ),
    model=model("openai-api/openm1/nano", BASE + "/v1"),
    display="none",
)
assert log.status == "success", log.error
assert any(message.role == "tool" for message in log.samples[0].messages), log.samples[0].messages
print("inspect-ai: accuracy 1.0 on three samples by two providers; a tool called")
