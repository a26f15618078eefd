"""litellm against a server: chat, streaming, tools, Anthropic's messages."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # Nothing is fetched.

import litellm

BASE = sys.argv[1]
USER = [{"role": "user", "content": "4 -9 +8 *9 +1"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


def ask(**more):
    wanted = {"model": "openai/nano", "api_base": BASE + "/v1", "api_key": "any", "messages": USER}
    return litellm.completion(**wanted, **more)


reply = ask(temperature=0)
assert reply.choices[0].message.content == "8", reply
assert reply.choices[0].message.reasoning_content.startswith("4 -9"), reply
assert reply.usage.completion_tokens_details.reasoning_tokens == 9, reply

chunks = list(ask(temperature=0, stream=True, stream_options={"include_usage": True}))
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "8", chunks
assert len(chunks) > 3

calls = ask(tools=[TOOL], tool_choice="required", seed=1).choices[0].message.tool_calls
assert all(json.loads(call.function.arguments)["a"] in range(10) for call in calls) and calls

reply = litellm.completion(
    model="anthropic/nano", api_base=BASE, api_key="any", messages=USER, max_tokens=64
)
assert reply.choices[0].finish_reason == "stop", reply
print("litellm: chat, stream, tools, anthropic")
