"""langchain-openai against a server: chat, streaming, tools, a form, the Responses API."""

import sys

from langchain_openai import ChatOpenAI

BASE = sys.argv[1]
QUESTION = "4 -9 +8 *9 +1"
ADD = {
    "title": "add",
    "description": "Adds.",
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
# Longer than what a stream hands over at once.
TELL = {
    "title": "tell",
    "description": "Tells.",
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 400, "maxLength": 420}},
    "required": ["text"],
    "additionalProperties": False,
}


def model(**more) -> ChatOpenAI:
    wanted = {"model": "nano", "base_url": BASE + "/v1", "api_key": "any", "max_retries": 0}
    return ChatOpenAI(**wanted, temperature=0, seed=1, **more)


reply = model().invoke(QUESTION)
assert reply.content == "8", reply
assert reply.usage_metadata["output_token_details"]["reasoning"] == 9, reply

chunks = list(model(stream_usage=True).stream(QUESTION))
assert "".join(chunk.content for chunk in chunks) == "8" and len(chunks) > 3, chunks

bound = model().bind_tools([ADD], tool_choice="any", parallel_tool_calls=False)
(call,) = bound.invoke(QUESTION).tool_calls
assert call["name"] == "add" and call["args"]["a"] in range(10), call
bound = model().bind_tools([TELL], tool_choice="any", parallel_tool_calls=False)
(call,) = bound.invoke(QUESTION).tool_calls
whole, num_chunks = None, 0
for chunk in bound.stream(QUESTION):
    whole = chunk if whole is None else whole + chunk
    num_chunks += bool(chunk.tool_call_chunks)
assert [(c["name"], c["args"]) for c in whole.tool_calls] == [("tell", call["args"])], whole
assert num_chunks > 2, "the arguments came in one piece"

for method in ("json_schema", "function_calling"):
    found = model().with_structured_output(ADD, method=method, strict=True).invoke(QUESTION)
    assert found["a"] in range(10), found

blocks = ChatOpenAI(
    model="nano", base_url=BASE + "/v1", api_key="any", use_responses_api=True, temperature=0
).invoke(QUESTION)
assert blocks.text == "8", blocks
print("langchain-openai: chat, stream, tools, forms, responses")
