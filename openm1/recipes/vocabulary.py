"""The vocabulary of nano models: bytes, the words of their tasks' prompts, M1's special tokens."""

from __future__ import annotations

from functools import cache

from openm1.chat.jinja_m1 import M1_CHAT_TEMPLATE
from openm1.chat.template import M1_TOOLS_CLOSE, M1_TOOLS_OPEN
from openm1.chat.thinking import THINK_CLOSE, THINK_OPEN
from openm1.chat.tokenizer import (
    BEGIN_OF_DOCUMENT,
    BEGINNING_OF_SENTENCE,
    END_OF_SENTENCE,
    Tokenizer,
    build_tokenizer,
)
from openm1.envs.chain import CHAIN_WORDS
from openm1.envs.hop import HOP_WORDS
from openm1.envs.phrases import CONTENT_WORDS, LOGIC_PHRASES
from openm1.envs.thoughts.letters import COUNT_WORDS
from openm1.envs.unknown import DONT_KNOW, GREETING

ROLE_WORDS = (
    "system ai_setting=assistant\n",
    "system tool_setting=tools\n",
    "user name=user\n",
    "ai name=assistant\n",
    "tool name=tools\n",
)
CALL_WORDS = (
    M1_TOOLS_OPEN,
    M1_TOOLS_CLOSE,
    '{"name": "calculator", "description": "',
    '", "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, '
    '"required": ["expression"]}}\n',
    "tool name: calculator\ntool result: ",
    '<tool_calls>\n{"name": "calculator", "arguments": {"expression": "',
    '"}}\n</tool_calls>',
)
SPECIAL_TOKENS = (
    BEGIN_OF_DOCUMENT,
    BEGINNING_OF_SENTENCE,
    END_OF_SENTENCE,
    THINK_OPEN,
    THINK_CLOSE,
)


@cache
def nano_tokenizer() -> Tokenizer:
    """Single characters for content, whole phrases for templates: short and easy to copy from."""
    phrases = (phrase for family in LOGIC_PHRASES.values() for phrase in family)
    words = dict.fromkeys(
        [
            *ROLE_WORDS,
            *CHAIN_WORDS,
            *HOP_WORDS,
            *COUNT_WORDS,
            *phrases,
            *CONTENT_WORDS,
            DONT_KNOW,
            GREETING,
            *CALL_WORDS,
        ]
    )
    return build_tokenizer(
        list(words), special_tokens=SPECIAL_TOKENS, chat_template=M1_CHAT_TEMPLATE
    )


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """The model's rows: the tokenizer's ids rounded up to a multiple of 64."""
    return -(-tokenizer.vocab_size // 64) * 64
