"""Outside: what a small model was never taught, and the honest reply to it."""

from __future__ import annotations

from random import Random

from openm1.envs.base import SingleTurnTaskset
from openm1.types import Message, Task

DONT_KNOW = "I don't know how to do that."
GREETING = "Hello! I can do sums, products, equations, words, letters and small puzzles."

_THINGS = (
    "the moon", "paris", "dogs", "a computer", "music", "love", "the weather", "python", "history",
    "the ocean", "football", "a bicycle", "bread", "the stock market", "japan", "trees", "my boss",
    "the sun", "a dragon", "coffee", "physics", "an elephant", "winter", "the president", "money",
    "france", "shakespeare", "chess", "the internet", "my dog", "cats", "rain", "a car", "germany",
    "pizza", "robots", "the universe", "dinosaurs", "happiness", "electricity", "gold", "spain",
)  # fmt: skip
_PLACES = (
    "france", "germany", "japan", "italy", "spain", "peru", "canada", "kenya", "brazil", "india",
    "norway", "egypt", "china", "mexico", "australia", "poland", "greece", "turkey", "chile",
)  # fmt: skip
_QUESTIONS = (
    "what is the capital of {p}", "tell me about {t}", "write a poem about {t}",
    "who invented {t}", "what do you think of {t}", "translate {t} into french",
    "how does {t} work", "write a story about {t}", "what is {t}", "why is {t} so popular",
    "give me a recipe for {t}", "what is the population of {p}", "who is the king of {p}",
    "how far is {p} from {q}", "what language do they speak in {p}", "do you like {t}",
    "what time is it in {p}", "who wrote a book about {t}", "explain {t} to me",
    "draw a picture of {t}", "what is the meaning of {t}", "sing a song about {t}",
    "how old is {t}", "when was {t} discovered", "what is the best thing about {t}",
    "should i buy {t}", "where can i find {t}", "what colour is {t}",
    "write an email about {t}", "what is the weather in {p}", "recommend a book about {t}",
    "is {t} better than {u}", "summarise the history of {p}", "what happened in {p} in {y}",
    "who won the world cup in {y}", "write a program about {t}", "fix my code",
    "what is your favourite food", "tell me a joke", "how are you", "what day is it",
    "help me with my homework about {t}", "what is a synonym for {t}", "compare {t} and {u}",
    "name three kinds of {t}", "how do i get to {p}", "how do i cook {t}",
    "what's the difference between {t} and {u}", "can you play chess", "what is the news",
    "who is the president of {p}", "how heavy is {t}", "how tall is {t}", "when did {y} begin",
    "what is the square root of {n}", "what is {n} degrees in fahrenheit",
    "what is {n} percent of {y}", "how many people live in {p}", "how many stars are there",
    "how many days are in {y}", "is {n} a lucky number", "convert {n} miles to kilometres",
    "integrate x^{k}", "what is the derivative of x^{k}", "sort these numbers: {n}, {y}, {k}",
    "what is {n} in roman numerals", "rhyme with {t}", "spell check this: {t}",
    "what is the plural of {t}", "complete the sentence: {t} is", "what is the opposite of {t}",
    "solve this sudoku", "solve the riddle of {t}", "what is log {n}", "unscramble {s}",
    "decrypt {s}", "{s}", "{s} {t}", "what does {s} mean", "{t} {u}", "{t}",
)  # fmt: skip
_GREETINGS = (
    "hello", "hi", "hey", "hi there", "good morning", "hello there", "what can you do",
    "who are you", "what are you", "help", "what can i ask you", "hi, who are you", "good evening",
    "hey there", "what do you know", "what can you help me with", "can you help me", "yo",
)  # fmt: skip
GREETING_SHARE = 0.15
_ENDINGS = ("", "", "?", "?", ".", "!", " please")


class UnknownTaskset(SingleTurnTaskset):
    """Questions of all sorts that no family asks; the answer says so, without a thought."""

    name = "unknown"

    def draw(self, rng: Random) -> Task:
        if rng.random() < GREETING_SHARE:
            text, answer = rng.choice(_GREETINGS), GREETING
        else:
            word = "".join(
                rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 9))
            )
            text = rng.choice(_QUESTIONS).format(
                t=rng.choice(_THINGS), u=rng.choice(_THINGS), p=rng.choice(_PLACES),
                q=rng.choice(_PLACES), y=rng.randint(1500, 2100), n=rng.randint(2, 5000),
                k=rng.randint(2, 9), s=word,
            )  # fmt: skip
            answer = DONT_KNOW
        text += rng.choice(_ENDINGS)
        if rng.random() < 0.5:
            text = text[0].upper() + text[1:]
        return Task(family=self.name, prompt=(Message(role="user", content=text),), answer=answer)

    def think(self, task: Task) -> str:
        return ""
