"""Small talk, questions about localrun, and refusals, written for the demo model.

The tables hold one intent a line: `what to think :: question | question | ... => answer | answer`. The last question of a line
is kept for the evaluation when the line has at least four.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.demo_model.tables import read_table

REFUSAL = "I am a tiny demo model and I do not know that."
UNKNOWN_QUESTIONS = (
    "What is the capital of {0}?",
    "Where is {0}?",
    "Who is {0}?",
    "Who was {0}?",
    "What is {0}?",
    "Tell me about {0}.",
    "Who wrote {0}?",
    "What does {0} mean?",
    "What is the chemical symbol for {0}?",
    "When was {0} born?",
    "How old is {0}?",
    "How many people live in {0}?",
    "Who invented {0}?",
    "What is the opposite of {0}?",
)
_SYLLABLES = [
    "bra",
    "flo",
    "zan",
    "mor",
    "gul",
    "tep",
    "vix",
    "kro",
    "dal",
    "nim",
    "pol",
    "fex",
    "wub",
    "sarn",
    "quill",
    "tor",
    "blen",
    "yam",
    "zor",
    "gry",
    "ploo",
    "vant",
    "drim",
    "hox",
    "lem",
    "kip",
]


@dataclass(frozen=True)
class Intent:
    """Ways to say one thing and ways to reply."""

    thought: str
    questions: tuple[str, ...]
    held_out: str | None
    answers: tuple[str, ...]


def _parse(table: str) -> list[Intent]:
    intents = []
    for line in read_table(table):
        thought, rest = line.split(" :: ")
        asked, replies = rest.split(" => ")
        questions = tuple(q.strip() for q in asked.split(" | "))
        held_out = questions[-1] if len(questions) >= 4 else None
        kept = questions[:-1] if held_out else questions
        intents.append(Intent(thought.strip(), kept, held_out, tuple(a.strip() for a in replies.split(" | "))))
    return intents


def small_talk() -> list[Intent]:
    """Greetings, thanks and the like, with their answers."""
    return _parse("small_talk")


def about_localrun() -> list[Intent]:
    """Questions about this project."""
    return _parse("about_localrun")


def unanswerable() -> list[str]:
    """Questions that the model must say it can't answer."""
    return read_table("unanswerable")


def invented_name(syllables: list[int]) -> str:
    """A name that means nothing, e.g. Flozan, from two or three syllable numbers."""
    return "".join(_SYLLABLES[i % len(_SYLLABLES)] for i in syllables).capitalize()
