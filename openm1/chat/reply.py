"""From the tokens of a reply to a message: thought, answer and tool calls apart."""

from __future__ import annotations

from collections.abc import Sequence

from openm1.chat.thinking import split_thought
from openm1.chat.tokenizer import Tokenizer
from openm1.chat.tools import parse_tool_calls
from openm1.types import Message


def reply_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a reply without its end of sentence; thought markers stay."""
    ids = list(token_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return tokenizer.decode(ids)


def parse_reply(
    tokenizer: Tokenizer, token_ids: Sequence[int], *, thought_opened: bool = False
) -> Message:
    """`thought_opened` says that the prompt ended inside a thought."""
    text = reply_text(tokenizer, token_ids)
    reasoning, answer = split_thought(text, opened=thought_opened)
    content, calls = parse_tool_calls(answer)
    return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls)
