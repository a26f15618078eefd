"""The byte-level vocabulary: round trips, word edges, injection safety, streams, files."""

from __future__ import annotations

import pickle

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from openm1.chat.tokenizer import (
    StreamDecoder,
    Tokenizer,
    build_tokenizer,
)

SPECIAL = (
    "<begin_of_document>",
    "<beginning_of_sentence>",
    "<end_of_sentence>",
    "<think>",
    "</think>",
)
WORDS = (
    "word",
    "words",
    " -9",
    "How many 1 bits",
    "\n\n",
    "=",
    " +",
    " +1",
    "12",
    "a|b",
    "\u00e9t\u00e9",
)
TOKENIZER = build_tokenizer(WORDS, special_tokens=SPECIAL)

any_text = st.text(st.characters(exclude_categories=["Cs"]))
rich_text = st.lists(
    st.sampled_from([*WORDS, *SPECIAL, " ", "5", "x", "\u00e9", "\U0001f600", "<", "\x00"])
    | any_text,
    max_size=10,
).map("".join)


def spelled(text: str) -> list[str]:
    return [TOKENIZER.decode([i]) for i in TOKENIZER.encode(text)]


def test_ids_are_bytes_then_words_then_special_tokens():
    assert TOKENIZER.encode("z\n") == [ord("z"), ord("\n")]
    longer = [word for word in WORDS if len(word) > 1]  # "=" is a byte already.
    assert [TOKENIZER.token_id(word) for word in longer] == list(range(256, 256 + len(longer)))
    assert TOKENIZER.special_tokens == {
        token: 256 + len(longer) + i for i, token in enumerate(SPECIAL)
    }
    assert TOKENIZER.vocab_size == 256 + len(longer) + len(SPECIAL)
    assert TOKENIZER.eos_token_id == TOKENIZER.special_id("<end_of_sentence>")
    assert TOKENIZER.special_id("word") is None
    assert TOKENIZER.token_id("nowhere") is None


def test_words_are_single_tokens_where_their_edges_are_free():
    assert spelled("word") == ["word"]
    assert spelled("words") == ["words"]
    assert spelled("wordy") == list("wordy")
    assert spelled("sword") == list("sword")
    assert spelled("7 -9 -95") == ["7", " -9", " ", "-", "9", "5"]
    assert spelled("(word)=word") == ["(", "word", ")", "=", "word"]
    assert spelled("How many 1 bits?") == ["How many 1 bits", "?"]
    assert spelled("12 123") == ["12", " ", "1", "2", "3"]
    assert spelled("a|b +1 +2") == ["a|b", " +1", " +", "2"]


@pytest.mark.parametrize("words", [WORDS, ()])
@given(rich_text)
def test_every_text_round_trips(words, text):
    tokenizer = TOKENIZER if words else build_tokenizer(words, special_tokens=SPECIAL)
    for allow_special in (False, True):
        ids = tokenizer.encode(text, allow_special=allow_special)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(rich_text)
def test_user_text_never_becomes_a_special_token(text):
    assert not set(TOKENIZER.encode(text)) & set(TOKENIZER.special_tokens.values())


@given(rich_text)
def test_trusted_text_equals_the_tokenizers_library(text):
    oracle = TOKENIZER._vocabulary.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.encode(text, allow_special=True) == oracle
    runs = TOKENIZER.split_special(text)
    assert "".join(run for run, _ in runs) == text
    assert [i for _, i in runs if i is not None] == [
        i for i in oracle if i in TOKENIZER.special_tokens.values()
    ]


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)), st.booleans())
def test_stream_equals_whole_and_the_library(ids, skip):
    stream = StreamDecoder(TOKENIZER, skip_special_tokens=skip)
    pieces = [stream.push(i) for i in ids]
    whole = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces) + stream.flush() == whole
    assert whole == TOKENIZER._vocabulary.decode(ids, skip_special_tokens=skip)


def test_stream_waits_for_a_whole_character():
    stream = StreamDecoder(TOKENIZER)
    assert [stream.push(i) for i in "\u20ac".encode()] == ["", "", "\u20ac"]
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"


def test_skipping_special_tokens_keeps_the_thought_visible():
    text = "<beginning_of_sentence><think>a</think>b<end_of_sentence>"
    ids = TOKENIZER.encode(text, allow_special=True)
    assert len(ids) == 6
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think>a</think>b"


def test_files_round_trip_here_and_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = "How many 1 bits 7 -9\n<think>\u00e9t\u00e9</think><end_of_sentence>"
    original = build_tokenizer(WORDS, special_tokens=SPECIAL, chat_template="{{ messages }}")
    original.save_pretrained(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for again in (Tokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(original))):
        for allow_special in (False, True):
            ids = original.encode(text, allow_special=allow_special)
            assert again.encode(text, allow_special=allow_special) == ids
        assert again.special_tokens == original.special_tokens
        assert again.eos_token_id == original.eos_token_id == oracle.eos_token_id
        assert again.chat_template == oracle.chat_template == "{{ messages }}"
    assert oracle.encode(text, add_special_tokens=False) == ids
    assert oracle.decode(ids) == text


def test_reads_other_shapes_of_the_settings(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        '{"eos_token": {"content": "</think>"}, "chat_template":'
        ' [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]}'
    )
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.chat_template) == ("</think>", "D")
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_pretrained(tmp_path).chat_template == "J"
    config.unlink()
    assert Tokenizer.from_pretrained(tmp_path).eos_token_id is None


def gguf_fields() -> dict:
    """A GPT-2 style vocabulary: two control tokens, one user-defined, all bytes, three merges."""
    bytes_spelled = [TOKENIZER._vocabulary.id_to_token(i) for i in range(256)]
    tokens = ["<|start|>", "<|end|>", *bytes_spelled, "th", "the", "12", "[mark]"]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": ["t h", "th e", "1 2"],
        "token_types": [3, 3] + [1] * 259 + [4],
        "eos_token_id": 1,
        "bos_token_id": 0,
        "chat_template": "T",
    }


def test_from_gguf_fields():
    tokenizer = Tokenizer.from_gguf_fields(**gguf_fields())
    tokens = gguf_fields()["tokens"]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (1, 0)
    assert tokenizer.special_tokens == {"<|start|>": 0, "<|end|>": 1}
    assert tokenizer.encode("the 12") == [tokens.index(t) for t in ("the", "\u0120", "1", "2")]
    gpt2 = Tokenizer.from_gguf_fields(**gguf_fields() | {"pre": "gpt-2"})
    assert gpt2.encode("12") == [tokens.index("12")]
    assert tokenizer.encode("<|end|>", allow_special=True) == [1]
    assert 1 not in tokenizer.encode("<|end|>")
    # A user-defined token is ordinary vocabulary: anyone may write it.
    assert tokenizer.encode("[mark]") == [tokens.index("[mark]")]
    assert tokenizer.decode(tokenizer.encode("the <|end|> \u00e9")) == "the <|end|> \u00e9"


def test_clear_errors(tmp_path):
    with pytest.raises(
        ValueError, match="pre-tokenizer is 'tekken'; allowed are 'gpt-2', 'smollm'"
    ):
        Tokenizer.from_gguf_fields(**gguf_fields() | {"pre": "tekken"})
    with pytest.raises(ValueError, match="allowed is 'gpt2'"):
        Tokenizer.from_gguf_fields(**gguf_fields() | {"model": "llama"})
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lone surrogate"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(ValueError, match=f"token id {TOKENIZER.vocab_size}"):
        TOKENIZER.decode([TOKENIZER.vocab_size])
    with pytest.raises(ValueError, match="both a word and a special token"):
        build_tokenizer(["<s>"], special_tokens=["<s>"])
    with pytest.raises(ValueError, match="printable ASCII"):
        build_tokenizer([], special_tokens=["<\u00e9>"])
    with pytest.raises(ValueError, match="eos_token is '<no>'"):
        build_tokenizer([], special_tokens=[], eos_token="<no>")
    other = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    other.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match="byte-level"):
        Tokenizer(other)
