"""Conversations as training examples, the loss on what the assistant wrote."""

from __future__ import annotations

from collections.abc import Sequence

from openm1.chat.template import ChatFormat
from openm1.data.packing import Example
from openm1.types import Message, ToolSpec


def conversation_example(
    chat_format: ChatFormat, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()
) -> Example:
    """Loss on thought, answer, tool calls and end of sentence of every assistant turn."""
    token_ids, loss_mask = chat_format.encode_with_mask(messages, tools)
    return Example(token_ids=token_ids, loss_mask=loss_mask)


def document_example(token_ids: Sequence[int]) -> Example:
    """Loss on every token, as in pretraining."""
    return Example(token_ids=token_ids, loss_mask=[True] * len(token_ids))
