"""Questions in words that training never saw, their scoring, and sample chats; for any `Talker`.

Knows nothing of PyTorch or of localrun's engine: `torch_evaluation` and `engine_evaluation` supply talkers.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tools.demo_model import arithmetic, smalltalk
from tools.demo_model.dialogue import Dialogue, Turn
from tools.demo_model.facts import Fact
from tools.demo_model.knowledge_base import Knowledge
from tools.demo_model.tokenizer import END_THINK

MAX_ANSWER_TOKENS = 160
SAMPLE_CHATS: tuple[tuple[str, ...], ...] = (
    ("Hello!", "Who are you?"),
    ("Could you tell me the capital of Portugal?", "And of Japan?"),
    ("Where is Kenya?", "Thanks!"),
    ("Which chemical symbol does gold have?", "And its atomic number?"),
    ("Can you tell me the opposite of the word brave?",),
    ("What is 17 + 25?", "And minus 12?"),
    ("How much is 7 times 8?",),
    ("Tell me a story about a fox.",),
    ("Can you write a story about Nora and a kite?", "What was the story about?"),
    ("What is an expert?", "And what is a tier?"),
    ("How big is DeepSeek-V4-Pro?",),
    ("Please explain what a volcano is.",),
    ("My name is Clara.", "What is the capital of Norway?", "What is my name?"),
    ("I feel a bit sad today.",),
    ("Who wrote War and Peace?", "And who wrote Pride and Prejudice?"),
    ("What is the capital of Zorblat?",),
    ("Do you need the internet?",),
    ("What day comes after Sunday?", "How many days are in April?"),
    ("Tell me a joke.",),
    ("How do I convert a checkpoint?", "Thank you, goodbye!"),
)


class Talker(Protocol):
    """Greedy continuation of prompts."""

    def answer(self, dialogues: Sequence[Dialogue]) -> list[str]:
        """The last turn's completion for each dialogue (reasoning included), up to EOS."""
        ...


@dataclass(frozen=True)
class Score:
    """Right answers among those asked; `exact` counts answers equal to the expected sentence."""

    asked: int
    right: int
    exact: int


@dataclass(frozen=True)
class Question:
    """One evaluation question: it is right if the answer holds `key`, exact if it is one of `expected`."""

    topic: str
    text: str
    key: str
    expected: tuple[str, ...]
    core: bool


def fact_questions(known: Knowledge, per_topic: int, seed: int = 1) -> list[Question]:
    """Unseen phrasings of known facts, held-out sums, and held-out phrasings of small talk, localrun questions and refusals."""
    rng = random.Random(seed)
    by_topic: dict[str, list[Fact]] = defaultdict(list)
    for fact in known.facts:
        by_topic[fact.topic if fact.core else f"{fact.topic} (rare)"].append(fact)
    questions = []
    for topic, facts in by_topic.items():
        for fact in rng.sample(facts, min(per_topic, len(facts))):
            questions.append(Question(topic, fact.held_out, fact.key, (fact.answer,), fact.core))
    for op in "+-x":
        seen = [arithmetic.Sum(a, op, b) for a in range(11) for b in range(11) if op != "-" or a >= b]
        unseen = [arithmetic.Sum(a, op, b) for a in range(51) for b in range(51) if op != "-" or a >= b]
        unseen = [s for s in unseen if s.held_out and op != "x"]
        for label, sums in ((f"sum {op}, numbers to 10", seen), (f"sum {op}, unseen, numbers to 50", unseen)):
            for s in rng.sample(sums, min(per_topic, len(sums))):
                text = arithmetic.HELD_OUT[op].format(a=s.a, b=s.b)
                questions.append(Question(label, text, f"= {s.result}.", (s.answer(),), label.endswith("10")))
    for topic, intents in (("small talk", smalltalk.small_talk()), ("about localrun", smalltalk.about_localrun())):
        for intent in intents:
            if intent.held_out:
                questions.append(Question(topic, intent.held_out, "", intent.answers, topic == "about localrun"))
    for i in range(per_topic):
        name = smalltalk.invented_name([rng.randrange(97) for _ in range(3)])
        text = smalltalk.UNKNOWN_QUESTIONS[i % len(smalltalk.UNKNOWN_QUESTIONS)].format(name)
        questions.append(Question("refusal of invented names", text, "do not know", (smalltalk.REFUSAL,), False))
    return questions


def ask(
    talker: Talker, questions: list[Question], think: bool = False
) -> tuple[dict[str, Score], list[tuple[Question, str]]]:
    """Scores by topic, and the answers that were wrong."""
    thought = "" if think else None
    answers = talker.answer([Dialogue([Turn(q.text, "", thought)]) for q in questions])
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    wrong = []
    for question, answer in zip(questions, answers, strict=True):
        said = answer.split(END_THINK)[-1].strip()
        exact = said in question.expected
        right = exact or (bool(question.key) and question.key.lower() in said.lower())
        tally[question.topic].update(asked=1, right=int(right), exact=int(exact))
        if not right:
            wrong.append((question, said))
    return {topic: Score(c["asked"], c["right"], c["exact"]) for topic, c in tally.items()}, wrong


def core_score(scores: dict[str, Score], questions: list[Question]) -> Score:
    """All core topics together."""
    core = {q.topic for q in questions if q.core}
    picked = [s for topic, s in scores.items() if topic in core]
    return Score(sum(s.asked for s in picked), sum(s.right for s in picked), sum(s.exact for s in picked))


def chat(talker: Talker, questions: Sequence[str], think: bool = False) -> list[tuple[str, str]]:
    """Questions asked one after another in one conversation, with the answers."""
    turns: list[Turn] = []
    said = []
    for question in questions:
        dialogue = Dialogue([*turns, Turn(question, "", "" if think else None)])
        answer = talker.answer([dialogue])[0]
        said.append((question, answer))
        turns.append(Turn(question, answer.split(END_THINK)[-1]))
    return said
