"""A tokenizer as the keys of a GGUF file, as far as llama.cpp can follow it.

llama.cpp knows a list of ways to split text before merging, by name. It decodes any byte-level
vocabulary; text becomes the same ids only where the split is one of those names. The whole
tokenizer goes along as JSON, under the specification's key for it, for readers that can use it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openm1.chat.tokenizer import GGUF_CONTROL, GGUF_USER_DEFINED, Tokenizer

GGUF_NORMAL, GGUF_UNUSED = 1, 5
DUMMY_MODEL = "rwkv"
"""llama.cpp's kind of vocabulary that has no end token unless the file names one."""

# The split of MiniMax's tokenizers, which is GPT-4o's. llama.cpp's own expression for it takes
# combining marks for punctuation.
_LETTER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT_4O = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTER[0]}*{_LETTER[1]}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTER[0]}+{_LETTER[1]}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# No text has these two bytes, so a merge of them is never made. llama.cpp refuses a vocabulary
# without merges.
_NO_MERGE = "\xfe \xff"

NO_TOKENIZER = "there is no tokenizer: llama.cpp takes token ids, and the text it prints is <id>"
OTHER_SPLIT = (
    "llama.cpp cannot split text as this tokenizer does: give it token ids as prompts; what it "
    "prints is right"
)
WHOLE_WORDS = (
    "llama.cpp finds this tokenizer's words inside longer ones too, so some text gets other ids: "
    "give it token ids where that matters; what it prints is right"
)


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    fields: dict[str, Any]
    """The file's keys: strings, bools, and lists of strings or integers."""
    notes: tuple[str, ...]
    """What llama.cpp does otherwise, in sentences for the user of the file."""


def gguf_vocabulary(
    tokenizer: Tokenizer, vocab_size: int, eos_token_id: int | None
) -> GgufVocabulary:
    """ValueError for a tokenizer larger than `vocab_size`, or without a token that ends a text:
    llama.cpp would take id 11 for it. `eos_token_id` is asked where the tokenizer names none."""
    raw = json.loads(tokenizer.to_json())
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_token_id
    if eos is None:
        raise ValueError("neither tokenizer nor config names an eos token; llama.cpp needs one")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {vocab_size}"
        )
    if raw["model"]["type"] != "BPE":
        raise ValueError(f"the tokenizer is of type {raw['model']['type']!r}; allowed is 'BPE'")
    split = _split_name(raw)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    tokens, types, unused = _tokens(tokenizer, raw, vocab_size, whole_words=not merges)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split or "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges or [_NO_MERGE],
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.huggingface.json": tokenizer.to_json(),
    }
    if tokenizer.bos_token_id is not None:
        fields["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    if unused:
        fields["tokenizer.ggml.suppress_tokens"] = unused
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    if split:
        return GgufVocabulary(fields, ())
    return GgufVocabulary(fields, (OTHER_SPLIT if merges else WHOLE_WORDS,))


def dummy_vocabulary(vocab_size: int, eos_token_id: int | None) -> GgufVocabulary:
    """For a model without a tokenizer: token 7 reads <7>, and text has no ids."""
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": DUMMY_MODEL,
        "tokenizer.ggml.tokens": [f"<{index}>" for index in range(vocab_size)],
        "tokenizer.ggml.token_type": [GGUF_NORMAL] * vocab_size,
    }
    if eos_token_id is not None:
        fields["tokenizer.ggml.eos_token_id"] = eos_token_id
    return GgufVocabulary(fields, (NO_TOKENIZER,))


def _tokens(
    tokenizer: Tokenizer, raw: Mapping[str, Any], vocab_size: int, *, whole_words: bool
) -> tuple[list[str], list[int], list[int]]:
    """Texts and types by id, and the ids that stand for nothing.

    Without merges a token of several bytes is found whole or not at all: it is written as one that
    the user defined, which llama.cpp looks for in the text before it splits.
    """
    tokens: list[str | None] = [None] * vocab_size
    types = [GGUF_UNUSED] * vocab_size
    for text, index in raw["model"]["vocab"].items():
        tokens[index], types[index] = text, GGUF_NORMAL
        if whole_words and len(text) > 1:
            word = tokenizer.token_bytes(index).decode("utf-8", "replace")
            if tokenizer.token_id(word) == index:
                tokens[index], types[index] = word, GGUF_USER_DEFINED
    for token in raw["added_tokens"]:
        kind = GGUF_CONTROL if token["special"] else GGUF_USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    unused = [index for index, token in enumerate(tokens) if token is None]
    texts = [f"<unused {index}>" if token is None else token for index, token in enumerate(tokens)]
    if len(set(texts)) < vocab_size:
        raise ValueError("two ids of the tokenizer have one text; llama.cpp cannot load that")
    return texts, types, unused


def _split_name(raw: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how the tokenizer splits text, None when it has none."""
    if raw["normalizer"] is not None or raw["model"].get("ignore_merges"):
        return None
    steps = raw["pre_tokenizer"] or {}
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern == _GPT_4O:
            return "gpt-4o"
    return None
