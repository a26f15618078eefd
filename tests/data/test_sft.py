from __future__ import annotations

from openm1.chat.template import chat_format_for
from openm1.data.sft import conversation_example, document_example
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.types import Message


def test_only_what_the_assistant_wrote_is_learned():
    tokenizer = nano_tokenizer()
    conversation = [
        Message(role="user", content="4 +3"),
        Message(role="assistant", reasoning="4 +3 =7", content="7"),
        Message(role="user", content="why?"),
        Message(role="assistant", content="so"),
    ]
    example = conversation_example(chat_format_for(tokenizer), conversation)
    learned = [t for t, flag in zip(example.token_ids, example.loss_mask, strict=True) if flag]
    assert tokenizer.decode(learned) == (
        "<think>4 +3 =7</think>7<end_of_sentence>so<end_of_sentence>"
    )
    assert "why?" in tokenizer.decode(example.token_ids)


def test_every_token_of_a_document_is_learned():
    assert document_example([5, 6, 7]).loss_mask == [True, True, True]
