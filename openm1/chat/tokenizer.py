"""Text to token ids and back, for byte-level BPE vocabularies.

Two promises hold here and nowhere else. Text that a user supplies never becomes a special token
(`allow_special=False`, the default): the vocabulary that encodes it does not know any. And pieces
of a stream joined are the whole text, because decoding goes through bytes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from openm1.chat.thinking import THINK_CLOSE, THINK_OPEN
from openm1.chat.tools import TOOL_CALLS_CLOSE, TOOL_CALLS_OPEN

MARKUP_TOKENS = (THINK_OPEN, THINK_CLOSE, TOOL_CALLS_OPEN, TOOL_CALLS_CLOSE)
"""Where these are single tokens no user may inject them, yet parsers must see them in the text:
they are special to `encode` and are not skipped by `decode(skip_special_tokens=True)`."""

BEGIN_OF_DOCUMENT = "<begin_of_document>"
BEGINNING_OF_SENTENCE = "<beginning_of_sentence>"
END_OF_SENTENCE = "<end_of_sentence>"

GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4
"""Token types of a GGUF file that stand outside the merges (llama.cpp's numbering)."""


class Tokenizer:
    """A byte-level BPE vocabulary with what a chat needs to know about it.

    Safe to share between threads and to pickle: nothing changes after construction.
    """

    def __init__(
        self,
        vocabulary: tokenizers.Tokenizer,
        *,
        eos_token: str | None = None,
        bos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        if not isinstance(vocabulary.decoder, decoders.ByteLevel):
            raise ValueError(
                f"only byte-level BPE tokenizers are supported, this one decodes with"
                f" {type(vocabulary.decoder).__name__}"
            )
        self._vocabulary = vocabulary
        self._plain = tokenizers.Tokenizer(vocabulary.model)
        self._plain.normalizer = vocabulary.normalizer
        self._plain.pre_tokenizer = vocabulary.pre_tokenizer
        added = vocabulary.get_added_tokens_decoder()
        self._special = {
            token.content: index
            for index, token in added.items()
            if token.special or token.content in MARKUP_TOKENS
        }
        self._special_ids = frozenset(self._special.values())
        self._added = {token.content: index for index, token in added.items()}
        self._skipped = self._special_ids - {self._added.get(token) for token in MARKUP_TOKENS}
        self._added_pattern = _pattern(added.values())
        self._ordinary_pattern = _pattern(
            token for token in added.values() if token.content not in self._special
        )
        self._bytes = _token_bytes(vocabulary)
        self.eos_token, self.bos_token = eos_token, bos_token
        self.chat_template = chat_template
        self.eos_token_id = self._named_id("eos_token", eos_token)
        self.bos_token_id = self._named_id("bos_token", bos_token)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja, the last two if
        they are there; FileNotFoundError without tokenizer.json."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}")
        vocabulary = tokenizers.Tokenizer.from_file(str(file))
        settings = folder / "tokenizer_config.json"
        config = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        template = folder / "chat_template.jinja"
        if template.is_file():
            chat_template = template.read_text("utf-8")
        else:
            chat_template = _default_template(config.get("chat_template"))
        return cls(
            vocabulary,
            eos_token=_token_text(config.get("eos_token")),
            bos_token=_token_text(config.get("bos_token")),
            chat_template=chat_template,
        )

    @classmethod
    def from_gguf_fields(
        cls,
        *,
        model: str,
        pre: str,
        tokens: Sequence[str],
        merges: Sequence[str],
        token_types: Sequence[int],
        eos_token_id: int | None = None,
        bos_token_id: int | None = None,
        chat_template: str | None = None,
        huggingface_json: str | None = None,
    ) -> Tokenizer:
        """From the values of a GGUF file's `tokenizer.ggml.*` keys and `tokenizer.chat_template`.

        Bytes that the vocabulary has no token for are dropped by `encode`, as llama.cpp does.
        With `huggingface_json`, a whole tokenizer.json, that decides instead.
        """
        if model != "gpt2":
            raise ValueError(f"GGUF tokenizer model is {model!r}; allowed is 'gpt2'")
        if len(token_types) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens but {len(token_types)} token types")
        if huggingface_json is not None:
            vocabulary = tokenizers.Tokenizer.from_str(huggingface_json)
        else:
            vocabulary = _gguf_tokenizer(pre, tokens, merges, token_types)
        return cls(
            vocabulary,
            eos_token=None if eos_token_id is None else tokens[eos_token_id],
            bos_token=None if bos_token_id is None else tokens[bos_token_id],
            chat_template=chat_template,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self._vocabulary.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "chat_template": self.chat_template,
        }
        present = {key: value for key, value in config.items() if value is not None}
        text = json.dumps(present, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self._vocabulary.to_str()

    @property
    def vocab_size(self) -> int:
        """The highest id + 1; a model's embedding may have more rows, never to be sampled."""
        return len(self._bytes)

    @property
    def special_tokens(self) -> dict[str, int]:
        """What only trusted text may contain, markup included, in id order."""
        return dict(sorted(self._special.items(), key=lambda item: item[1]))

    def special_id(self, token: str) -> int | None:
        """The id of a special token; None when the string is ordinary text here."""
        return self._special.get(token)

    def token_id(self, text: str) -> int | None:
        """The id of the one token that spells `text`; None when there is none."""
        if text in self._added:
            return self._added[text]
        return self._vocabulary.token_to_id("".join(_BYTE_TO_CHAR[byte] for byte in text.encode()))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Nothing is added around the text. Give `allow_special` only to text you wrote yourself.

        ValueError on a lone surrogate, which has no UTF-8.
        """
        ids: list[int] = []
        for run, index in self._split(
            text, self._added_pattern if allow_special else self._ordinary_pattern
        ):
            if index is None:
                ids += self._encode_plain(run)
            else:
                ids.append(index)
        return ids

    def split_special(self, text: str) -> list[tuple[str, int | None]]:
        """Trusted text as (run, id of the special token it is, or None for ordinary text)."""
        runs: list[tuple[str, int | None]] = []
        for run, index in self._split(text, self._added_pattern):
            special = index if index in self._special_ids else None
            if special is None and runs and runs[-1][1] is None:
                run = runs.pop()[0] + run
            runs.append((run, special))
        return runs

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ValueError on an id the vocabulary lacks."""
        data = b"".join(self.token_bytes(i, skip_special=skip_special_tokens) for i in ids)
        return data.decode("utf-8", "replace")

    def token_bytes(self, index: int, *, skip_special: bool = False) -> bytes:
        data = self._bytes[index] if 0 <= index < len(self._bytes) else None
        if data is None:
            raise ValueError(f"token id {index} is not in the vocabulary of {self.vocab_size}")
        return b"" if skip_special and index in self._skipped else data

    def _encode_plain(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds a lone surrogate at {error.start}") from error
        return self._plain.encode(text, add_special_tokens=False).ids

    def _split(
        self, text: str, pattern: re.Pattern[str] | None
    ) -> Iterable[tuple[str, int | None]]:
        position = 0
        for match in pattern.finditer(text) if pattern else ():
            if match.start() > position:
                yield text[position : match.start()], None
            run = match.group()
            yield run, self._added[run if run in self._added else run.strip()]
            position = match.end()
        if position < len(text):
            yield text[position:], None

    def _named_id(self, role: str, token: str | None) -> int | None:
        index = None if token is None else self.token_id(token)
        if token is not None and index is None:
            raise ValueError(f"{role} is {token!r}, which is not in the vocabulary")
        return index


class StreamDecoder:
    """Decodes ids as they come; never emits half a character. The pieces join to `decode`."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *token_ids: int) -> str:
        token_bytes, skip = self._tokenizer.token_bytes, self._skip
        return self._decoder.decode(
            b"".join([token_bytes(i, skip_special=skip) for i in token_ids])
        )

    def flush(self) -> str:
        """An unfinished character as U+FFFD; the decoder can then be used again."""
        return self._decoder.decode(b"", final=True)


def build_tokenizer(
    words: Sequence[str],
    *,
    special_tokens: Sequence[str],
    eos_token: str | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """A small vocabulary for nano models: 256 bytes (id = byte), `words`, then `special_tokens`.

    A word may hold blanks and punctuation and is one token wherever it appears, except where a
    letter or digit at its edge touches another one (" -9" is not taken from " -95"). The leftmost
    word wins, then the longest. All other text stays single bytes. Repeated words count once.
    `eos_token` defaults to <end_of_sentence> when that is among the special tokens.
    """
    for token in special_tokens:
        if not token or not token.isascii() or not token.isprintable() or token != token.strip():
            raise ValueError(f"special token {token!r} must be printable ASCII without edge blanks")
        if token in words:
            raise ValueError(f"{token!r} is both a word and a special token")
    if "" in words or len(set(special_tokens)) != len(special_tokens):
        raise ValueError("words must not be empty, special tokens must differ")
    spelled = ["".join(_BYTE_TO_CHAR[byte] for byte in word.encode()) for word in words]
    entries = dict.fromkeys([*_BYTE_TO_CHAR, *spelled])
    vocabulary = tokenizers.Tokenizer(
        models.BPE({entry: index for index, entry in enumerate(entries)}, [], ignore_merges=True)
    )
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    longer = sorted({word for word in words if len(word.encode()) > 1}, key=lambda w: (-len(w), w))
    if longer:
        pattern = Regex("|".join(_guarded(word) for word in longer))
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        vocabulary.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    else:
        vocabulary.pre_tokenizer = to_bytes
    vocabulary.decoder = decoders.ByteLevel()
    for token in special_tokens:
        _add(vocabulary, token, special=token not in MARKUP_TOKENS)
    if eos_token is None and END_OF_SENTENCE in special_tokens:
        eos_token = END_OF_SENTENCE
    return Tokenizer(vocabulary, eos_token=eos_token, chat_template=chat_template)


def _guarded(word: str) -> str:
    escaped = "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in word)
    before = r"(?<![\p{L}\p{N}])" if word[0].isalnum() else ""
    after = r"(?![\p{L}\p{N}])" if word[-1].isalnum() else ""
    return before + escaped + after


def _gguf_tokenizer(
    pre: str, tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int]
) -> tokenizers.Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, pairs)
    )
    vocabulary.pre_tokenizer = _gguf_pre_tokenizer(pre)
    vocabulary.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, token_types, strict=True):
        if kind in (GGUF_CONTROL, GGUF_USER_DEFINED):
            _add(vocabulary, token, special=kind == GGUF_CONTROL)
    return vocabulary


def _gguf_pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "gpt-2":
        return byte_level
    if pre == "smollm":  # Every number character stands alone, the rest is GPT-2's split.
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    raise ValueError(f"GGUF pre-tokenizer is {pre!r}; allowed are 'gpt-2', 'smollm'")


def _add(vocabulary: tokenizers.Tokenizer, token: str, *, special: bool) -> None:
    entry = AddedToken(token, special=special, normalized=False)
    if special:
        vocabulary.add_special_tokens([entry])
    else:
        vocabulary.add_tokens([entry])


def _pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Matches any of the tokens, the longest first, with the blanks it is declared to swallow."""
    alternatives = []
    for token in sorted(tokens, key=lambda token: -len(token.content)):
        if token.single_word:
            raise ValueError(f"added token {token.content!r}: single_word is not supported")
        before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
        alternatives.append(before + re.escape(token.content) + after)
    return re.compile("|".join(alternatives)) if alternatives else None


def _token_bytes(vocabulary: tokenizers.Tokenizer) -> list[bytes | None]:
    """By id, what each token adds to a text; None for an id that no token has."""
    spelled = vocabulary.get_vocab(with_added_tokens=True)
    table: list[bytes | None] = [None] * (max(spelled.values()) + 1)
    char_to_byte = {char: byte for byte, char in enumerate(_BYTE_TO_CHAR)}
    added = vocabulary.get_added_tokens_decoder()
    for token, index in spelled.items():
        if index in added or not all(char in char_to_byte for char in token):
            table[index] = token.encode()
        else:
            table[index] = bytes(char_to_byte[char] for char in token)
    return table


def _byte_characters() -> list[str]:
    """GPT-2's spelling of each byte as one visible character: itself where it is visible in
    Latin-1, else the next one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


_BYTE_TO_CHAR = _byte_characters()


def _default_template(value: Any) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones."""
    if isinstance(value, list):
        named = {entry["name"]: entry["template"] for entry in value}
        if "default" not in named:
            raise ValueError(f"no chat template is called 'default'; there are {sorted(named)}")
        return named["default"]
    return value


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json holds a token as a string or as {"content": ...}."""
    return value["content"] if isinstance(value, dict) else value
