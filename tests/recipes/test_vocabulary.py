from __future__ import annotations

import json
import os
import subprocess
import sys
from random import Random

import pytest

from openm1.chat.tokenizer import END_OF_SENTENCE
from openm1.envs.catalog import make_taskset
from openm1.envs.chain import CHAIN_WORDS
from openm1.envs.hop import HOP_WORDS
from openm1.envs.phrases import CONTENT_WORDS, LOGIC_PHRASES
from openm1.envs.thoughts.letters import COUNT_WORDS
from openm1.envs.unknown import DONT_KNOW, GREETING
from openm1.recipes.vocabulary import (
    CALL_WORDS,
    ROLE_WORDS,
    SPECIAL_TOKENS,
    nano_tokenizer,
    padded_vocab_size,
)

TOKENIZER = nano_tokenizer()
PHRASES = [phrase for family in LOGIC_PHRASES.values() for phrase in family]


@pytest.mark.parametrize(
    "words",
    [
        CHAIN_WORDS,
        HOP_WORDS,
        COUNT_WORDS,
        ROLE_WORDS,
        PHRASES,
        CONTENT_WORDS,
        (DONT_KNOW, GREETING),
        CALL_WORDS,
    ],
)
def test_each_word_and_phrase_is_one_token_of_its_own(words: list[str]):
    ids = [TOKENIZER.encode(word) for word in words]
    assert [len(i) for i in ids] == [1] * len(words)
    assert len({i[0] for i in ids}) == len(set(words))
    assert [TOKENIZER.decode(i) for i in ids] == list(words)


def test_special_tokens_are_one_token_only_where_they_are_meant():
    for token in SPECIAL_TOKENS:
        assert TOKENIZER.encode(token, allow_special=True) == [TOKENIZER.special_id(token)]
        assert len(TOKENIZER.encode(token)) == len(token)
    assert TOKENIZER.eos_token_id == TOKENIZER.special_id(END_OF_SENTENCE)


def test_a_chain_has_one_token_for_each_item():
    taskset = make_taskset("chain")
    for task in taskset.test(0, 50):
        for text in (task.prompt[0].content, taskset.solution(task, Random(0)).reasoning or ""):
            ids = TOKENIZER.encode(text)
            assert len(ids) == len(text.split())
            assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("family", list(LOGIC_PHRASES))
def test_prompts_and_thoughts_survive_the_tokenizer(family: str):
    taskset = make_taskset(family)
    for task in taskset.test(0, 10):
        for text in (task.prompt[0].content, taskset.solution(task, Random(0)).reasoning or ""):
            assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
        # The template is nearly nothing: what is left are the items.
        assert len(TOKENIZER.encode(task.prompt[0].content)) < 110


def test_ids_are_dense_and_bytes_come_first():
    assert [TOKENIZER.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    size = TOKENIZER.vocab_size
    assert len({TOKENIZER.token_bytes(i) for i in range(256, size)}) == size - 256
    assert padded_vocab_size(TOKENIZER) % 64 == 0
    assert 0 <= padded_vocab_size(TOKENIZER) - size < 64


def test_ids_are_the_same_in_every_process():
    # A set anywhere in the making would order them by the process's hash seed.
    script = (
        "import json; from openm1.recipes.vocabulary import nano_tokenizer; t = nano_tokenizer();"
        "print(json.dumps([list(t.token_bytes(i)) for i in range(t.vocab_size)]))"
    )
    env = os.environ | {"PYTHONHASHSEED": "123"}
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=env, check=True, timeout=120
    ).stdout
    here = [list(TOKENIZER.token_bytes(i)) for i in range(TOKENIZER.vocab_size)]
    assert json.loads(output) == here
