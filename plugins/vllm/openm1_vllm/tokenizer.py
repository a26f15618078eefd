"""The checkpoint's tokenizer with M1's own end of sentence and a template that works."""

from __future__ import annotations

from typing import Any

from vllm.tokenizers.hf import CachedHfTokenizer, HfTokenizer

from openm1.chat.jinja_m1 import m1_chat_template
from openm1.chat.tokenizer import BEGINNING_OF_SENTENCE, END_OF_SENTENCE


class M1Tokenizer(CachedHfTokenizer):
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> HfTokenizer:
        """A tokenizer without M1's sentence tokens keeps its own template and end."""
        tokenizer = super().from_pretrained(*args, **kwargs)
        vocabulary = tokenizer.get_vocab()
        if BEGINNING_OF_SENTENCE in vocabulary and END_OF_SENTENCE in vocabulary:
            tokenizer.eos_token = END_OF_SENTENCE
            thoughts = {"<think>", "</think>"} <= vocabulary.keys()
            tokenizer.chat_template = m1_chat_template(think_is_token=thoughts)
        return tokenizer
