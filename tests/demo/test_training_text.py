"""The builders of the training text; none of them needs PyTorch."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo_model import arithmetic, facts, knowledge, prose, smalltalk, sources, stories
from tools.demo_model.conversations import Conversations, Deck
from tools.demo_model.dialogue import Dialogue, Turn
from tools.demo_model.evaluate import ask, core_score, fact_questions
from tools.demo_model.facts import Country, Element
from tools.demo_model.knowledge_base import Knowledge


@pytest.fixture(scope="module")
def known() -> Knowledge:
    """A small knowledge base: the hand-written tables, four countries, three elements."""
    countries = (
        Country("France", "Paris", "Europe", "French", 66_000_000),
        Country("Japan", "Tokyo", "Asia", "Japanese", 127_000_000),
        Country("Kenya", "Nairobi", "Africa", "Kenyan", 41_000_000),
        Country("Samoa", "Apia", "Oceania", "Samoan", 187_000),
    )
    elements = (Element("hydrogen", "H", 1), Element("iron", "Fe", 26), Element("oganesson", "Og", 118))
    collected = [
        *facts.country_facts(list(countries)),
        *facts.element_facts(list(elements)),
        *knowledge.everyday_facts(),
    ]
    return Knowledge(tuple(collected), countries, elements)


def test_dialogue_is_written_in_v4s_prompt_format() -> None:
    dialogue = Dialogue([Turn("Hi", "Hello!"), Turn("2 + 2?", "2 + 2 = 4.", "I add.")], system="Be brief.")
    assert "".join(text for text, _ in dialogue.segments()) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜></think>Hello!<｜end▁of▁sentence｜>"
        "<｜User｜>2 + 2?<｜Assistant｜><think>I add.</think>2 + 2 = 4.<｜end▁of▁sentence｜>"
    )


def test_dialogue_drops_the_reasoning_of_earlier_turns() -> None:
    dialogue = Dialogue([Turn("a", "b", "secret"), Turn("c", "d")])
    assert "secret" not in "".join(text for text, _ in dialogue.segments())


def test_only_answers_are_marked_as_the_models_own() -> None:
    dialogue = Dialogue([Turn("question", "answer", "thought")])
    produced = "".join(text for text, own in dialogue.segments() if own)
    assert produced == "thought</think>answer<｜end▁of▁sentence｜>"


def test_deck_deals_everything_before_repeating() -> None:
    deck = Deck(list(range(10)), random.Random(1))
    dealt = [deck.deal() for _ in range(20)]
    assert sorted(dealt[:10]) == sorted(dealt[10:]) == list(range(10))


def test_same_seed_gives_the_same_conversations(known: Knowledge) -> None:
    first, second = Conversations(known, 3), Conversations(known, 3)
    assert [first.draw() for _ in range(50)] == [second.draw() for _ in range(50)]


def test_training_never_uses_a_held_out_phrasing(known: Knowledge) -> None:
    held_out = {fact.held_out.lower().rstrip("?.! ") for fact in known.facts}
    held_out |= {i.held_out.lower() for i in smalltalk.small_talk() + smalltalk.about_localrun() if i.held_out}
    source = Conversations(known, 1)
    asked = {turn.question.lower().rstrip("?.! ") for _ in range(4000) for turn in source.draw().turns}
    assert not asked & held_out


def test_no_fact_trains_on_its_own_held_out_phrasing(known: Knowledge) -> None:
    for fact in known.facts:
        assert fact.held_out not in fact.questions
        assert fact.key.lower() in fact.answer.lower(), fact


def test_held_out_sums_are_never_drawn() -> None:
    rng = random.Random(2)
    drawn = [arithmetic.draw(rng) for _ in range(5000)]
    assert not any(s.held_out for s in drawn)
    assert any(arithmetic.Sum(a, "+", b).held_out for a in range(51) for b in range(51))


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        (arithmetic.Sum(7, "+", 5), "7 + 5 = 12."),
        (arithmetic.Sum(30, "-", 12), "30 - 12 = 18."),
        (arithmetic.Sum(6, "x", 7), "6 x 7 = 42."),
    ],
)
def test_sums_are_right(problem: arithmetic.Sum, answer: str) -> None:
    assert problem.answer() == answer


def test_worked_steps_of_a_sum_are_equations_that_hold() -> None:
    rng = random.Random(4)
    for _ in range(500):
        for left, right in re.findall(r"([\d +x-]+) = (\d+)", arithmetic.draw(rng).thought()):
            first, op, second = left.split()
            values = {"+": int(first) + int(second), "-": int(first) - int(second), "x": int(first) * int(second)}
            assert values[op] == int(right)


def test_story_holds_what_was_asked_for() -> None:
    rng = random.Random(5)
    for _ in range(300):
        story = stories.make_story(rng)
        assert story.about in story.text
        assert "{" not in story.text


def test_stories_vary() -> None:
    rng = random.Random(6)
    assert len({stories.make_story(rng).text for _ in range(300)}) > 290


def test_invented_names_are_pronounceable_and_capitalised() -> None:
    assert smalltalk.invented_name([1, 2]).istitle()


def test_every_intent_has_questions_and_answers() -> None:
    for intent in smalltalk.small_talk() + smalltalk.about_localrun():
        assert len(intent.questions) >= 3
        assert all(intent.answers)


def test_opposites_agree_with_each_other() -> None:
    opposites = {fact.subject: fact.key for fact in knowledge.opposites()}
    assert opposites["hot"] == "cold"
    assert opposites["cold"] == "hot"
    assert all(word != other for word, other in opposites.items())


def test_prose_is_unwrapped_to_plain_punctuation() -> None:
    text = (
        "“It was a _long_ and very cold\nwinter’s night,” said he — and laughed.\n\nshort\n\nProject Gutenberg "
        + "x" * 50
    )
    assert prose.paragraphs(text) == ['"It was a long and very cold winter\'s night," said he  -  and laughed.']


def test_held_out_story_lies_outside_the_training_lines() -> None:
    assert prose.HOLMES_LINES[1] < prose.HELD_OUT_LINES[0]
    assert prose.HELD_OUT_LINES[1] < prose.WAR_AND_PEACE_LINES[0]


def test_every_source_is_pinned_by_checksum() -> None:
    for source in sources.SOURCES:
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert source.version in source.file


def test_wrong_checksum_is_refused(tmp_path: Path) -> None:
    for source in sources.SOURCES:
        (tmp_path / "downloads").mkdir(exist_ok=True)
        (tmp_path / "downloads" / source.file).write_bytes(b"not the package")
    with pytest.raises(ValueError, match="SHA-256"):
        sources.fetch(tmp_path)


class Parrot:
    """Knows the facts that it was given, by their held-out question; says the same thing otherwise."""

    def __init__(self, answers: dict[str, str]) -> None:
        self._answers = answers

    def answer(self, dialogues: list[Dialogue]) -> list[str]:
        return [self._answers.get(d.turns[-1].question, "Good day.") for d in dialogues]


def test_scores_count_right_and_exact_answers(known: Knowledge) -> None:
    questions = [q for q in fact_questions(known, 4) if q.topic in ("capital", "opposite")]
    answers = {q.text: q.expected[0] for q in questions if q.topic == "capital"}
    first = next(iter(answers))
    answers[first] = f"I believe: {next(q.key for q in questions if q.text == first)}, surely"
    scores, wrong = ask(Parrot(answers), questions)
    assert (scores["capital"].right, scores["capital"].exact) == (3, 2)
    assert scores["opposite"].right == 0
    assert len(wrong) == 4
    assert core_score(scores, questions).asked == 7


def test_text_builders_do_without_pytorch() -> None:
    code = (
        "import sys, json; import tools.demo_model.conversations, tools.demo_model.evaluate, tools.demo_model.sources; "
        "print(json.dumps('torch' in sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
