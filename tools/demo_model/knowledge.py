"""Everyday knowledge written for the demo model: word meanings, opposites, animals, the calendar, small general knowledge.

All text here is the project's own. The tables hold one entry a line; lines of `general` are `question|question|... = key =
answer`, their last question being kept for the evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator

from tools.demo_model.facts import MEANING_QUESTIONS, Fact, fill
from tools.demo_model.tables import read_table

OPPOSITE_QUESTIONS = (
    "What is the opposite of {0}?",
    "Tell me the opposite of {0}.",
    "What's the opposite of {0}?",
    "opposite of {0}",
    "Give me the opposite of {0}.",
    "Which word is the opposite of {0}?",
)
OPPOSITE_HELD_OUT = "Can you tell me the opposite of the word {0}?"

SOUNDS = """dog barks|cat meows|cow moos|sheep bleats|horse neighs|pig oinks|duck quacks|lion roars|bee buzzes|snake hisses
owl hoots|mouse squeaks|frog croaks|wolf howls|rooster crows|bird sings|donkey brays|hen clucks|pigeon coos|goat bleats"""

BABIES = """dog puppy|cat kitten|cow calf|horse foal|sheep lamb|pig piglet|goat kid|duck duckling|goose gosling|chicken chick
bear cub|lion cub|deer fawn|kangaroo joey|frog tadpole|swan cygnet
owl owlet|eagle eaglet|seal pup|elephant calf|whale calf|rabbit bunny"""

COLORS = """the sky=blue|grass=green|snow=white|blood=red|a banana=yellow|the sun=yellow|coal=black|a carrot=orange|milk=white
a lemon=yellow|a leaf=green|a tomato=red|chocolate=brown|a strawberry=red|the sea=blue|an elephant=gray|a raven=black|gold=yellow
a pumpkin=orange|a cloud=white"""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
MONTH_LENGTHS = ("31", "28 or 29", "31", "30", "31", "30", "31", "31", "30", "31", "30", "31")
ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)


def _entries(table: str) -> list[str]:
    return [entry.strip() for line in table.strip().splitlines() for entry in line.split("|") if entry.strip()]


def with_article(noun: str) -> str:
    """`an owl`, `a cat`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def meanings() -> Iterator[Fact]:
    """From the table of definitions."""
    for line in read_table("meanings"):
        word, sentence = line.split(": ", 1)
        questions = list(MEANING_QUESTIONS)
        if word.startswith("to "):
            questions = [
                "What does it mean to {0}?",
                'What does "to {0}" mean?',
                "Define to {0}.",
                "Explain what to {0} means.",
            ]
            word = word.removeprefix("to ")
            held_out = "Can you explain what it means to {0}?"
        elif sentence.startswith(("A ", "An ")):
            article = with_article(word)
            questions += [
                f"What is {article}?",
                f"What's {article}?",
                f"Tell me what {article} is.",
                f"Explain what {article} is.",
            ]
            held_out = f"Can you explain what {article} is?"
        else:
            noun = f"the {word}" if sentence.startswith("The ") else word
            questions += [f"What is {noun}?", f"What's {noun}?", f"Tell me what {noun} is."]
            held_out = f"Can you explain what {noun} is?"
        thought = f"The user asks what {word} means. I explain it simply."
        yield Fact("definition", word, sentence, fill(questions, word), held_out.format(word), sentence, thought)


def opposites() -> Iterator[Fact]:
    """From the table of opposites, both ways."""
    seen: set[str] = set()
    for pair in read_table("opposites"):
        a, b = pair.split()
        for word, other in ((a, b), (b, a)):
            if word in seen:
                continue
            seen.add(word)
            yield Fact(
                "opposite",
                word,
                other,
                fill(OPPOSITE_QUESTIONS, word),
                OPPOSITE_HELD_OUT.format(word),
                f"The opposite of {word} is {other}.",
                f"The user asks for the opposite of {word}. That is {other}.",
            )


def animals() -> Iterator[Fact]:
    """The sounds that animals make."""
    for entry in _entries(SOUNDS):
        animal, verb = entry.split()
        a = with_article(animal)
        questions: tuple[str, ...] = (
            f"What sound does {a} make?",
            f"What does {a} do to make noise?",
            f"What noise does {a} make?",
        )
        answer = f"{a[0].upper()}{a[1:]} {verb}."
        yield Fact("animal sound", animal, verb, questions, f"Which sound does {a} make?", answer, f"{answer}")
    for entry in _entries(BABIES):
        animal, young = entry.split()
        a = with_article(animal)
        questions = (
            f"What is a baby {animal} called?",
            f"What do you call a baby {animal}?",
            f"What is the young of {a} called?",
            f"What's a baby {animal}?",
        )
        answer = f"A baby {animal} is called {with_article(young)}."
        held_out = f"What is the name for a baby {animal}?"
        yield Fact(
            "animal baby", animal, young, questions, held_out, answer, f"The user asks about young animals. {answer}"
        )
    for entry in _entries(COLORS):
        thing, color = entry.split("=")
        questions = (f"What color is {thing}?", f"What is the color of {thing}?", f"Which color does {thing} have?")
        answer = f"{thing[0].upper()}{thing[1:]} is {color}."
        yield Fact(
            "color",
            thing,
            color,
            questions,
            f"Tell me which color {thing} is.",
            answer,
            f"The user asks for a color. {answer}",
        )


def calendar() -> Iterator[Fact]:
    """Which day or month comes before or after another."""
    questions: tuple[str, ...]
    for sequence, noun in ((DAYS, "day"), (MONTHS, "month")):
        for i, name in enumerate(sequence):
            for word, other in (("after", sequence[(i + 1) % len(sequence)]), ("before", sequence[i - 1])):
                questions = (
                    f"What {noun} comes {word} {name}?",
                    f"Which {noun} is {word} {name}?",
                    f"What comes {word} {name}?",
                    f"Tell me the {noun} {word} {name}.",
                )
                answer = f"{other} comes {word} {name}."
                held_out = f"Which {noun} comes right {word} {name}?"
                thought = f"The user asks for the {noun} {word} {name}. That is {other}."
                yield Fact(f"{noun} {word}", name, other, questions, held_out, answer, thought)
    for i, month in enumerate(MONTHS):
        questions = (f"How many days does {month} have?", f"How many days are in {month}?", f"How long is {month}?")
        answer, length = f"{month} has {MONTH_LENGTHS[i]} days.", MONTH_LENGTHS[i]
        yield Fact("month length", month, length, questions, f"What is the number of days in {month}?", answer, answer)
        n = ORDINALS[i]
        questions = (
            f"What is the {n} month of the year?",
            f"Which month is the {n} one?",
            f"Name the {n} month of the year.",
        )
        answer = f"{month} is the {n} month of the year."
        yield Fact("month number", n, month, questions, f"Which is the {n} month of a year?", answer, answer)


def general() -> Iterator[Fact]:
    """From the table of questions that have no pattern."""
    for line in read_table("general"):
        phrasings, key, answer = (part.strip() for part in line.split(" = "))
        *questions, held_out = phrasings.split("|")
        yield Fact("general", questions[0], key, tuple(questions), held_out, answer, f"I know this. {answer}")


def everyday_facts() -> list[Fact]:
    """All facts of this module."""
    return [*meanings(), *opposites(), *animals(), *calendar(), *general()]
