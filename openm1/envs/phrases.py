"""What a tokenizer of a very small model should keep whole: templates, animals, names, terms.

Letters and digits of the items stay single, because the thoughts look at them one by one.
"""

from __future__ import annotations

LOGIC_PHRASES: dict[str, tuple[str, ...]] = {
    "count_bits": (
        "How many 1 bits are there in the binary representation of the number ",
        "?",
    ),
    "spell_backward": ("Spell this word backward (example: sun -> nus): ",),
    "letter_counting": (
        'How many times does the letter "',
        '" appear in the text: "',
        '"?',
    ),
    "word_sequence_reversal": (
        "Solve the following problem.\n\nProvide you answer as a comma-separated list of words "
        "with a space after the comma.\n\nReverse this list of words: ",
    ),
    "chain_sum": ("State the final answer to the following arithmetic problem: ", " ="),
    "products": (
        "Solve the following multiplication: ",
        ". Give only the result as your final answer.",
    ),
    "gcd": (
        "Find the Greatest Common Divisor (GCD) of these numbers: ",
        ". Give only the GCD as your final answer.",
    ),
    "lcm": ("Find the Least Common Multiple (LCM) of these numbers: ",),
    "prime_factorization": (
        "Find the prime factorization of ",
        ". Write the factors separated by × (Example: for 12 the answer would be: 2 × 2 × 3)",
        " × ",
    ),
    "leg_counting": (
        "Your task is to count how many legs there are in total when given a list of animals.\n\n"
        "Now, how many legs are there in total if you have ",
        "?\n",
    ),
    "simple_equations": (
        "Find the value of ",
        " in the equation: ",
        "Solve for ",
        "Determine the value of ",
        " that satisfies: ",
    ),
    "simple_geometry": (
        "Given a convex polygon with ",
        " sides, its first ",
        " interior angles are: ",
        ". What is the measure of the remaining interior angle (in degrees)?"
        "Return only the angle as your answer.Do not give the units in your answer.",
        "A convex polygon has ",
        " sides. The measures of the first ",
        ". Find the measure of the last interior angle."
        "Return only the angle as your answer.Do not give the units in your answer.",
        "Consider a convex ",
        "-gon whose first ",
        ". Determine the measure of the remaining angle."
        "Return only the angle as your answer.Do not give the units in your answer.",
        ".0°, ",
        ".0°",
    ),
    "complex_arithmetic": (
        "Add the complex numbers: (",
        "Subtract the complex numbers: (",
        "Multiply the complex numbers: (",
        "Divide the complex numbers: (",
        ") + (",
        ") - (",
        ") × (",
        ") ÷ (",
    ),
    "aiw": (
        " brothers and she also has",
        " sisters and she also has",
        " sisters. How many sisters does",
        " brothers. How many sisters does",
        "'s brother have?",
        " male friends and she also has",
        " female friends. They all are friends with each other and have no other friends aside. "
        "How many female friends does",
        ", a male friend of",
        ", have?",
        " male colleagues and she also has",
        " female colleagues. These are all colleagues that",
        " has. All these mentioned persons around",
        " are colleagues of each other.",
        " male colleagues and",
        " female colleagues in total. All these mentioned persons around",
        " are colleagues of each other. The people in the circle around",
        " do not have other colleagues aside - with the only exception of Matilda. She is "
        "colleague of",
        " and she is also colleague of",
        ", being part of",
        "'s circle. How many female colleagues does Matilda have?",
    ),
    "syllogism": (
        "Consider these statements:\n1. ",
        "\n2. ",
        "\n\nDoes it logically follow that:\n",
        "?\n(Answer Yes or No)",
        "All",
        "No",
        "Some",
    ),
    "family_relationships": (
        " is married to",
        ". They have a child called",
        ". They have children called",
        ".\n\nWhat is",
        ".\n\nHow is",
        ".\n\nWhat relation is",
        "? Respond only with the word that describes their relationship.",
        " related to",
        "? Provide the relationship in one word.",
        "? Answer with a single word.",
    ),
}
"""The fixed parts of each family's prompts; the items stand between them."""

ANIMALS: dict[str, int] = {
    "snake": 0, "sea slug": 0, "jellyfish": 0, "flatworm": 0, "leech": 0, "chicken": 2, "bird": 2,
    "human": 2, "duck": 2, "dog": 4, "cat": 4, "cow": 4, "horse": 4, "lion": 4, "elephant": 4,
    "giraffe": 4, "tiger": 4, "deer": 4, "sheep": 4, "starfish": 5, "insect": 6, "ant": 6,
    "butterfly": 6, "beetle": 6, "bee": 6, "wasp": 6, "grasshopper": 6, "cricket": 6,
    "cockroach": 6, "praying mantis": 6, "firefly": 6, "spider": 8, "scorpion": 8, "crab": 10,
    "lobster": 10, "shrimp": 10, "woodlouse": 14,
}  # fmt: skip
"""How many legs each of the package's animals has."""

TERMS: tuple[str, ...] = (
    "mortals", "humans", "children", "adults", "parents", "grandparents", "philosophers",
    "students", "teachers", "doctors", "scientists", "artists", "musicians", "writers",
    "programmers", "engineers", "lawyers", "chefs", "animals", "mammals", "dogs", "cats", "birds",
    "fish", "reptiles", "insects", "butterflies", "bees", "ants", "spiders", "horses", "elephants",
    "lions", "tigers", "whales", "dolphins",
)  # fmt: skip
"""The terms of the package's syllogisms."""

NAMES: tuple[str, ...] = (
    "James", "John", "Robert", "Michael", "William", "David", "Richard", "Joseph", "Thomas",
    "Charles", "Peter", "Daniel", "Matthew", "Christopher", "Andrew", "George", "Edward",
    "Benjamin", "Henry", "Samuel", "Alexander", "Oliver", "Jack", "Harry", "Jacob", "Noah", "Ethan",
    "Lucas", "Mason", "Logan", "Sebastian", "Theodore", "Owen", "Liam", "Aiden", "Kai", "Jayden",
    "Zion", "Phoenix", "Atlas", "Axel", "Ryder", "Finn", "Bob", "Mary", "Patricia", "Jennifer",
    "Linda", "Elizabeth", "Barbara", "Susan", "Jessica", "Sarah", "Karen", "Emma", "Lisa", "Anna",
    "Margaret", "Victoria", "Charlotte", "Sophia", "Isabella", "Olivia", "Ava", "Mia", "Emily",
    "Abigail", "Amelia", "Grace", "Alice", "Lucy", "Chloe", "Sophie", "Lily", "Hannah",
    "Zoe", "Luna", "Nova", "Aria", "Willow", "Aurora", "Sage", "River", "Winter", "Sky", "Rain",
)  # fmt: skip
"""The package's first names."""

RELATIONS: tuple[str, ...] = (
    "mother", "father", "sister", "brother", "daughter", "son", "wife", "husband", "grandmother",
    "grandfather", "aunt", "uncle", "niece", "nephew", "mother-in-law", "father-in-law",
)  # fmt: skip

CONTENT_WORDS: tuple[str, ...] = (
    *(f" {name}" for name in NAMES),
    *NAMES,
    *(f" {animal}" for animal in ANIMALS),
    *(f" {animal}s" for animal in ANIMALS),
    *(f" {term}" for term in TERMS),
    *RELATIONS,
    " female",
    " male",
    "Yes",
    "No",
)
