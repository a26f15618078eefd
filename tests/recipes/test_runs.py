from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from openm1.chat.template import chat_format_for
from openm1.chat.tokenizer import END_OF_SENTENCE
from openm1.common.config import load_config, save_config
from openm1.data.packing import Example
from openm1.envs.base import is_held_out
from openm1.recipes.catalog import RECIPES, recipe_stage
from openm1.recipes.runs import ModelShape, RLRun, SupervisedRun, TraceData, TraceSource, load_start
from openm1.recipes.vocabulary import nano_tokenizer
from openm1.rl.config import RLConfig
from openm1.rl.losses import CISPO, DAPO, GRPO, PPO, REINFORCE, Unified

TOKENIZER = nano_tokenizer()
FAMILIES = ("chain", "hop", "count_bits", "spell_backward")
STAGES = [stage for recipe in RECIPES.values() for stage in recipe.values()]


def source(**options) -> TraceSource:
    data = {"families": {"chain": 0.5, "hop": 0.5}, "batch_tokens": 300} | options
    return TraceSource(TraceData(**data), chat_format_for(TOKENIZER))


def question(example: Example) -> str:
    text = TOKENIZER.decode(example.token_ids)
    return text.split("user name=user\n")[1].split(END_OF_SENTENCE)[0]


def reply(example: Example) -> str:
    text = TOKENIZER.decode(example.token_ids)
    return text.split("ai name=assistant\n")[1].split(END_OF_SENTENCE)[0]


def test_the_examples_of_a_step_depend_on_seed_and_step_alone():
    options = {"direct_share": {"chain": 0.3}, "chain_full_share": 0.5}
    first, second = source(**options), source(**options)
    forwards = [first(step) for step in range(5)]
    backwards = [second(step) for step in reversed(range(5))]
    assert forwards == backwards[::-1]
    texts = [question(example) for batch in forwards for example in batch]
    assert len(set(texts)) > 0.9 * len(texts)
    assert source(**options, seed=1)(0) != forwards[0]


def test_a_batch_is_filled_with_whole_conversations():
    for step in range(20):
        sizes = [len(example.token_ids) for example in source()(step)]
        assert sum(sizes) >= 300 > sum(sizes[:-1])


def test_conversations_have_up_to_max_turns_questions():
    batch = source(max_turns=3, batch_tokens=20_000)(0)
    texts = [TOKENIZER.decode(example.token_ids) for example in batch]
    counts = Counter(text.count("user name=user\n") for text in texts)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > len(batch) / 5
    # Every reply is learned, in whichever turn it stands.
    learned = [
        TOKENIZER.decode([t for t, m in zip(e.token_ids, e.loss_mask, strict=True) if m])
        for e in batch
    ]
    ends = [text.count(END_OF_SENTENCE) for text in learned]
    assert ends == [text.count("ai name=assistant\n") for text in texts]
    # Turns take consecutive tasks, so no question is asked twice.
    single = source(batch_tokens=20_000)(0)
    asked = [part for text in texts for part in text.split("user name=user\n")[1:]]
    assert [part.split(END_OF_SENTENCE)[0] for part in asked][:50] == [
        question(example) for example in single
    ][:50]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_held_out_prompt_is_trained_on(family: str):
    examples = source(families={family: 1.0}, batch_tokens=1)
    questions = [question(examples(step)[0]) for step in range(2000)]
    assert len(set(questions)) > 1000
    assert not any(is_held_out(text) for text in questions)


def test_each_family_has_its_share_of_direct_answers():
    # Taken from the numbers that also pick the family, all of them fell to the first one.
    examples = source(batch_tokens=30_000, direct_share={"chain": 0.3, "hop": 0.1})(0)
    totals, direct = Counter[str](), Counter[str]()
    for example in examples:
        family = "hop" if "hops" in question(example) else "chain"
        totals[family] += 1
        direct[family] += reply(example).startswith("<think></think>")
    assert min(totals.values()) > 150
    assert direct["chain"] / totals["chain"] == pytest.approx(0.3, abs=0.1)
    assert direct["hop"] / totals["hop"] == pytest.approx(0.1, abs=0.07)


def test_a_chat_is_hasty_throughout_or_not_at_all():
    batch = source(max_turns=4, batch_tokens=20_000, direct_share={"chain": 0.4, "hop": 0.4})(0)
    chats = [TOKENIZER.decode(example.token_ids) for example in batch]
    hasty = [(text.count("<think></think>"), text.count("ai name=assistant\n")) for text in chats]
    assert all(count in (0, turns) for count, turns in hasty)
    assert {count > 0 for count, turns in hasty if turns > 1} == {True, False}


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_chains_are_thought_through_as_often_as_asked(share: float):
    examples = source(families={"chain": 1.0}, batch_tokens=8000, chain_full_share=share)(0)
    thoughts = [reply(e).removeprefix("<think>").split("</think>")[0] for e in examples]
    # A full thought writes a result after each operation.
    whole = [text.count("=") == len(text.split()) // 2 for text in thoughts]
    assert sum(whole) / len(whole) == pytest.approx(share, abs=0.1)


def test_some_questions_come_in_other_words_and_some_are_easier():
    options = {"families": {"gcd": 1.0}, "batch_tokens": 20_000}
    plain, worded, easier = (
        source(**options, **more)(0)
        for more in ({}, {"reworded_share": 0.5}, {"easier_share": 1.0})
    )
    own = [question(example).startswith("Find the Greatest") for example in worded]
    assert all(question(example).startswith("Find the Greatest") for example in plain)
    assert sum(own) / len(own) == pytest.approx(0.5, abs=0.15)
    # The thought and the answer stay those of the question in the family's words.
    for one, other in zip(plain, worded, strict=False):
        assert reply(one) == reply(other)
    lengths = [sum(map(len, map(reply, batch))) / len(batch) for batch in (plain, easier)]
    assert lengths[1] < 0.8 * lengths[0]


def test_a_calculator_is_offered_called_and_believed():
    batch = source(calculator_share=1.0, batch_tokens=3000)(0)
    for example in batch:
        text = TOKENIZER.decode(example.token_ids)
        assert '"name": "calculator"' in text.split("user name=user\n")[0]
        call, result, answer = text.split("<beginning_of_sentence>")[-3:]
        assert '{"name": "calculator", "arguments": {"expression": "' in call
        value = result.split("tool result: ")[1].split("\n")[0]
        assert answer.endswith(f"</think>{value}{END_OF_SENTENCE}\n")


def test_only_the_reply_is_learned():
    for example in source()(0):
        tokens = zip(example.token_ids, example.loss_mask, strict=True)
        learned = TOKENIZER.decode([token for token, flag in tokens if flag])
        assert learned == reply(example) + END_OF_SENTENCE


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: str(stage.folder))
def test_every_stage_comes_back_from_its_file(tmp_path: Path, stage: SupervisedRun | RLRun):
    save_config(stage, tmp_path / "config.json")
    assert load_config(type(stage), tmp_path / "config.json") == stage


@pytest.mark.parametrize(
    "loss",
    [
        CISPO(eps_is_high=2.0),
        DAPO(),
        GRPO(eps_low=0.1),
        PPO(),
        REINFORCE(aggregation="combined"),
        # The bounds that are off are infinite, which JSON has no word for.
        Unified(eps_high=0.3),
    ],
)
def test_every_loss_comes_back_as_itself(tmp_path: Path, loss):
    run = RLRun(folder=Path("a"), init=Path("b"), families={"hop": 1.0}, rl=RLConfig(loss=loss))
    save_config(run, tmp_path / "config.json")
    back = load_config(RLRun, tmp_path / "config.json")
    assert back == run
    assert type(back.rl.loss) is type(loss)


def test_each_stage_starts_where_the_one_before_it_writes():
    for recipe in RECIPES.values():
        previous: SupervisedRun | RLRun | None = None
        for stage in recipe.values():
            assert stage.init == (previous.folder if previous else None)
            previous = stage


def test_unknown_recipes_and_stages_are_refused(monkeypatch: pytest.MonkeyPatch):
    assert recipe_stage("chain", "rl") is RECIPES["chain"]["rl"]
    with pytest.raises(ValueError, match="recipe is 'chess'; allowed are chain"):
        recipe_stage("chess", "rl")
    monkeypatch.setitem(RECIPES, "short", {"pretrain": RECIPES["chain"]["pretrain"]})
    with pytest.raises(ValueError, match="stage of short is 'rl'; allowed are pretrain"):
        recipe_stage("short", "rl")


def test_a_shape_has_the_vocabulary_and_the_end_of_its_tokenizer():
    config = replace(ModelShape(), num_hidden_layers=16).config(TOKENIZER)
    assert config.vocab_size >= TOKENIZER.vocab_size
    assert config.eos_token_id == TOKENIZER.eos_token_id
    assert sum(config.attn_type_list) == 2


def test_impossible_data_are_refused():
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        source(batch_tokens=0)
    with pytest.raises(ValueError, match=r"reworded_share is 1.5; allowed is 0 to 1"):
        source(reworded_share=1.5)
    with pytest.raises(ValueError, match=r"direct_share names \['gcd'\]"):
        source(direct_share={"gcd": 0.5})


def test_a_run_without_a_checkpoint_is_no_start(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint yet"):
        load_start(tmp_path)


def test_a_missing_stage_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="sft does not exist; run the stage before"):
        load_start(tmp_path / "sft")
