from __future__ import annotations

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from openm1.chat.gguf_vocabulary import (
    OTHER_SPLIT,
    WHOLE_WORDS,
    dummy_vocabulary,
    gguf_vocabulary,
)
from openm1.chat.tokenizer import Tokenizer, build_tokenizer

GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merging_tokenizer(*steps: pre_tokenizers.PreTokenizer, **settings: bool) -> Tokenizer:
    """a, b, the merge ab, and an end token; `steps` split the text."""
    vocabulary = tokenizers.Tokenizer(
        models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], **settings)
    )
    vocabulary.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence([*steps])
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens(["<end>"])
    return Tokenizer(vocabulary, eos_token="<end>", chat_template="{{ messages }}")


def byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((byte_level(True),), "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), byte_level(True)), "smollm"),
        ((pre_tokenizers.Split(Regex(GPT_4O), "isolated"), byte_level(False)), "gpt-4o"),
    ],
)
def test_known_splits_go_by_their_names(steps, name: str) -> None:
    vocabulary = gguf_vocabulary(merging_tokenizer(*steps), 6, None)
    fields = vocabulary.fields
    assert fields["tokenizer.ggml.pre"] == name and vocabulary.notes == ()
    assert fields["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<end>", "<unused 4>", "<unused 5>"]
    assert fields["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 5, 5]
    assert fields["tokenizer.ggml.suppress_tokens"] == [4, 5]
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.ggml.eos_token_id"] == 3
    assert "tokenizer.ggml.bos_token_id" not in fields
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    "tokenizer",
    [
        merging_tokenizer(pre_tokenizers.Split(Regex("x|y"), "isolated"), byte_level(False)),
        merging_tokenizer(byte_level(True), ignore_merges=True),
        merging_tokenizer(byte_level(False)),
    ],
)
def test_other_splits_are_noted(tokenizer: Tokenizer) -> None:
    assert gguf_vocabulary(tokenizer, 4, None).notes == (OTHER_SPLIT,)


def test_words_without_merges_are_looked_for_in_the_text() -> None:
    tokenizer = build_tokenizer(
        ["two words", " é"], special_tokens=["<end_of_sentence>", "<think>"]
    )
    vocabulary = gguf_vocabulary(tokenizer, tokenizer.vocab_size, None)
    tokens = vocabulary.fields["tokenizer.ggml.tokens"]
    assert tokens[256:] == ["two words", " é", "<end_of_sentence>", "<think>"]
    # <think> is no control token: its text is part of what is printed.
    assert vocabulary.fields["tokenizer.ggml.token_type"] == [1] * 256 + [4, 4, 3, 4]
    assert tokens[0x20] == "Ġ" and tokens[0x41] == "A"
    assert vocabulary.notes == (WHOLE_WORDS,)


def test_what_llama_cpp_cannot_load_is_refused() -> None:
    tokenizer = merging_tokenizer(byte_level(True))
    with pytest.raises(ValueError, match="4 ids, the model's vocab_size is 3"):
        gguf_vocabulary(tokenizer, 3, None)
    without_end = build_tokenizer([], special_tokens=[])
    with pytest.raises(ValueError, match="names an eos token"):
        gguf_vocabulary(without_end, 256, None)
    assert gguf_vocabulary(without_end, 256, 10).fields["tokenizer.ggml.eos_token_id"] == 10


def test_without_a_tokenizer_ids_have_names() -> None:
    vocabulary = dummy_vocabulary(3, None)
    assert vocabulary.fields["tokenizer.ggml.tokens"] == ["<0>", "<1>", "<2>"]
    assert "tokenizer.ggml.eos_token_id" not in vocabulary.fields
    assert dummy_vocabulary(3, 2).fields["tokenizer.ggml.eos_token_id"] == 2
