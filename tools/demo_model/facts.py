"""Facts from packaged databases as questions with one answer each: countries, US states, chemical elements, word meanings.

Every relation has phrasings that training uses and one that only the evaluation uses (`held_out`).
"""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fact:
    """One thing to know.

    Attributes:
        topic: relation, e.g. `capital`; the evaluation groups by it.
        subject: what it is about, e.g. `France`.
        key: the word that a right answer must contain.
        questions: phrasings for training.
        held_out: a phrasing that training never sees.
        answer: the sentence to say.
        thought: reasoning to show in think mode.
        core: whether it belongs to the core facts, which are repeated most.
    """

    topic: str
    subject: str
    key: str
    questions: tuple[str, ...]
    held_out: str
    answer: str
    thought: str
    core: bool = True


CAPITAL_QUESTIONS = (
    "What is the capital of {0}?",
    "What's the capital of {0}?",
    "Tell me the capital of {0}.",
    "Which city is the capital of {0}?",
    "Name the capital of {0}.",
    "Do you know the capital of {0}?",
    "capital of {0}",
    "What is the capital city of {0}?",
    "What is {0}'s capital?",
)
CAPITAL_HELD_OUT = "Can you tell me which city is {0}'s capital city?"
OF_CAPITAL_QUESTIONS = (
    "{0} is the capital of which country?",
    "Which country has the capital {0}?",
    "{0} is the capital of what country?",
    "Of which country is {0} the capital?",
)
OF_CAPITAL_HELD_OUT = "What country is {0} the capital of?"
CONTINENT_QUESTIONS = (
    "Where is {0}?",
    "Which continent is {0} in?",
    "What continent is {0} on?",
    "In which part of the world is {0}?",
    "Where can I find {0} on a map?",
)
CONTINENT_HELD_OUT = "On which continent is {0}?"
SYMBOL_QUESTIONS = (
    "What is the chemical symbol for {0}?",
    "What is the symbol of {0}?",
    "What's the symbol for {0}?",
    "Tell me the chemical symbol of {0}.",
    "chemical symbol for {0}",
    "How is {0} written in chemistry?",
)
SYMBOL_HELD_OUT = "Which chemical symbol does {0} have?"
OF_SYMBOL_QUESTIONS = (
    "Which element has the symbol {0}?",
    "What element is {0}?",
    "What does the chemical symbol {0} stand for?",
    "{0} is the symbol of which element?",
)
OF_SYMBOL_HELD_OUT = "Which chemical element is written {0}?"
NUMBER_QUESTIONS = (
    "What is the atomic number of {0}?",
    "How many protons does {0} have?",
    "Tell me the atomic number of {0}.",
    "What number is {0} in the periodic table?",
)
NUMBER_HELD_OUT = "Which atomic number does {0} have?"
MEANING_QUESTIONS = (
    'What does "{0}" mean?',
    "What does {0} mean?",
    "Define {0}.",
    "What does the word {0} mean?",
    "Explain the word {0}.",
    "What is the meaning of {0}?",
)
MEANING_HELD_OUT = "Can you define the word {0}?"

# the database's names and capitals that are out of date or unusual in English
_RENAMED = {
    "Swaziland": ("Eswatini", "Mbabane"),
    "Republic of Macedonia": ("North Macedonia", "Skopje"),
    "Kazakhstan": ("Kazakhstan", "Astana"),
    "Sri Lanka": ("Sri Lanka", "Sri Jayawardenepura Kotte"),
    "United States": ("the United States", "Washington, D.C."),
    "United Kingdom": ("the United Kingdom", "London"),
    "Netherlands": ("the Netherlands", "Amsterdam"),
    "Philippines": ("the Philippines", "Manila"),
    "United Arab Emirates": ("the United Arab Emirates", "Abu Dhabi"),
    "Dominican Republic": ("the Dominican Republic", "Santo Domingo"),
    "Czech Republic": ("the Czech Republic", "Prague"),
    "Central African Republic": ("the Central African Republic", "Bangui"),
    "Democratic Republic of the Congo": ("the Democratic Republic of the Congo", "Kinshasa"),
    "Republic of the Congo": ("the Republic of the Congo", "Brazzaville"),
    "The Gambia": ("the Gambia", "Banjul"),
    "Comoros": ("the Comoros", "Moroni"),
    "Solomon Islands": ("the Solomon Islands", "Honiara"),
}
_NOT_COUNTRIES = {
    "Hong Kong",
    "Macau",
    "Puerto Rico",
    "Palestine",
    "Western Sahara",
    "Taiwan",
    "Serbia and Montenegro",
    "Réunion",
}
_SMALL_BUT_KNOWN = {"Iceland", "Malta", "The Bahamas", "Barbados", "Maldives", "Samoa", "Tonga", "Monaco", "Andorra"}
_SMALL_BUT_KNOWN |= {"Belize", "San Marino", "Liechtenstein"}
_REGIONS = {
    "Northern America": "North America",
    "Australia and New Zealand": "Oceania",
    "Sub-Saharan Africa": "Africa",
    "Northern Africa": "Africa",
}
_SOUTH_AMERICA = set(
    [
        "Argentina",
        "Bolivia",
        "Brazil",
        "Chile",
        "Colombia",
        "Ecuador",
        "Guyana",
        "Paraguay",
        "Peru",
        "Suriname",
        "Uruguay",
        "Venezuela",
    ]
)
_ISLANDS_OF_THE_CARIBBEAN = {
    "Cuba",
    "Haiti",
    "the Dominican Republic",
    "Jamaica",
    "Trinidad and Tobago",
    "The Bahamas",
    "Barbados",
}


def ascii_letters(text: str) -> str:
    """Accents dropped: Asunción -> Asuncion."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(templates: Iterable[str], *values: str) -> tuple[str, ...]:
    """Templates with {0}, {1} filled in, first letters in upper case."""
    return tuple(_capitalised(t.format(*values)) for t in templates)


@dataclass(frozen=True)
class Country:
    """What questions about a country are made of."""

    name: str
    capital: str
    place: str
    """Continent, or where in it: `South America`, `the Caribbean`."""
    people: str
    """What someone from there is called."""
    population: int


def countries(root: Path) -> list[Country]:
    """From the unpacked package `countryinfo`, without the smallest ones and with the names that people use."""
    found: dict[str, Country] = {}
    for path in sorted((root / "countryinfo" / "data").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        name, capital, population = record.get("name"), record.get("capital"), record.get("population") or 0
        if not name or not isinstance(capital, str) or name in _NOT_COUNTRIES:
            continue
        if population < 500_000 and name not in _SMALL_BUT_KNOWN:
            continue
        name, capital = _RENAMED.get(name, (name, capital))
        place = record.get("subregion", "")
        if place == "Latin America and the Caribbean":
            central = "the Caribbean" if name in _ISLANDS_OF_THE_CARIBBEAN else "Central America"
            place = "South America" if name in _SOUTH_AMERICA else "North America" if name == "Mexico" else central
        elif place in _REGIONS:
            place = _REGIONS[place]
        else:
            place = record["region"]
        name, capital = ascii_letters(name), ascii_letters(capital).replace("Washington D.C.", "Washington, D.C.")
        found[name] = Country(name, capital, place, record.get("demonym", ""), population)
    return list(found.values())


def country_facts(list_of_countries: list[Country]) -> Iterator[Fact]:
    """Capitals, continents and peoples; those of large or often named countries are core knowledge."""
    for c in list_of_countries:
        core = c.population >= 4_000_000 or c.name in (
            "Iceland",
            "Uruguay",
            "Jamaica",
            "Mongolia",
            "Luxembourg",
            "Malta",
        )
        yield Fact(
            "capital",
            c.name,
            c.capital,
            fill(CAPITAL_QUESTIONS, c.name),
            CAPITAL_HELD_OUT.format(c.name),
            f"The capital of {c.name} is {c.capital}.",
            f"The user asks for the capital of {c.name}. The capital of {c.name} is {c.capital}.",
            core,
        )
        yield Fact(
            "country of a capital",
            c.capital,
            c.name,
            fill(OF_CAPITAL_QUESTIONS, c.capital),
            OF_CAPITAL_HELD_OUT.format(c.capital),
            f"{c.capital} is the capital of {c.name}.",
            f"The user asks which country has the capital {c.capital}. That is {c.name}.",
            core,
        )
        yield Fact(
            "continent",
            c.name,
            c.place,
            fill(CONTINENT_QUESTIONS, c.name),
            CONTINENT_HELD_OUT.format(c.name),
            _capitalised(f"{c.name} is in {c.place}."),
            f"The user asks where {c.name} is. It is in {c.place}.",
            core,
        )


def state_capitals(root: Path) -> Iterator[tuple[str, str]]:
    """US states with their capitals from the quiz file, whose names hold `{optional}` letters and `|` alternatives."""
    for line in (root / "usr/share/games/bsdgames/quiz/state").read_text(encoding="utf-8").splitlines():
        fields = line.split(":")
        if len(fields) >= 2:
            state, capital = (re.sub(r"[{}]", "", field.split("|")[0]) for field in fields[:2])
            yield state, capital


def state_facts(root: Path) -> Iterator[Fact]:
    """Capitals of the US states."""
    for state, capital in state_capitals(root):
        name = "the US state of Georgia" if state == "Georgia" else state
        yield Fact(
            "state capital",
            name,
            capital,
            fill(CAPITAL_QUESTIONS, name),
            CAPITAL_HELD_OUT.format(name),
            f"The capital of {name} is {capital}.",
            f"The user asks for the capital of {name}. The capital of {name} is {capital}.",
        )


@dataclass(frozen=True)
class Element:
    """A chemical element."""

    name: str
    symbol: str
    number: int


def elements(root: Path) -> list[Element]:
    """From the unpacked package `mendeleev`, in British spelling."""
    with sqlite3.connect(root / "mendeleev" / "elements.db") as database:
        rows = database.execute("select name, symbol, atomic_number from elements order by atomic_number").fetchall()
    spelling = {"Aluminum": "aluminium", "Cesium": "caesium", "Sulphur": "sulfur"}
    return [Element(spelling.get(n, n.lower()), s, int(z)) for n, s, z in rows]


def element_facts(list_of_elements: list[Element]) -> Iterator[Fact]:
    """Symbols and atomic numbers; those of common elements are core knowledge."""
    for e in list_of_elements:
        n, s, z = e.name, e.symbol, str(e.number)
        core = e.number <= 60 or e.name in (
            "tungsten",
            "platinum",
            "gold",
            "mercury",
            "lead",
            "radium",
            "uranium",
            "plutonium",
        )
        yield Fact(
            "element symbol",
            n,
            s,
            fill(SYMBOL_QUESTIONS, n),
            SYMBOL_HELD_OUT.format(n),
            f"The chemical symbol for {n} is {s}.",
            f"The user asks for the symbol of {n}. It is {s}.",
            core,
        )
        yield Fact(
            "element of a symbol",
            s,
            n,
            fill(OF_SYMBOL_QUESTIONS, s),
            OF_SYMBOL_HELD_OUT.format(s),
            f"{s} is the chemical symbol for {n}.",
            f"The user asks what {s} stands for. {s} is {n}.",
            core,
        )
        yield Fact(
            "atomic number",
            n,
            z,
            fill(NUMBER_QUESTIONS, n),
            NUMBER_HELD_OUT.format(n),
            f"The atomic number of {n} is {z}.",
            f"The user asks for the atomic number of {n}. It is {z}.",
            core,
        )


_UNFIT = re.compile(
    r"\b(sex|sexual|slur|offensive|obscene|vulgar|penis|vagina|genital|rape|ethnic|intercourse|prostitut|breast|kill|"
    r"naked|copulat|anus|excre|urin|drug|disparag|slang|slave|race|racial|Jew|Christ|God|Islam|suicide)\w*",
    re.IGNORECASE,
)


def word_meanings(root: Path, n_words: int, avoid: set[str]) -> list[tuple[str, str]]:
    """The `n_words` nouns and verbs that WordNet's sense-tagged text uses most, with their first sense as a sentence."""
    folder = root / "package" / "dict"
    tagged: dict[str, tuple[int, str, str]] = {}
    for part in ("noun", "verb"):
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            n_pointers = int(fields[3])
            word, n_tagged, offset = fields[0], int(fields[5 + n_pointers]), fields[6 + n_pointers]
            if re.fullmatch(r"[a-z]{3,12}", word) and n_tagged > tagged.get(word, (0, "", ""))[0]:
                tagged[word] = (n_tagged, part, offset)
    wanted = {(part, offset) for _, part, offset in tagged.values()}
    glosses = {key: gloss for key, gloss in _glosses(folder) if key in wanted}
    ranked = sorted(tagged.items(), key=lambda item: (-item[1][0], item[0]))
    meanings: list[tuple[str, str]] = []
    for word, (_, part, offset) in ranked:
        lemmas, gloss = glosses[(part, offset)]
        if word in avoid or word not in lemmas or _UNFIT.search(gloss) or _UNFIT.search(word):
            continue
        text = re.sub(r"\([^)]*\)", "", gloss.split(";")[0]).strip()
        text = " ".join(text.split())
        if not 15 <= len(text) <= 75 or re.search(rf"\b{word}", text):
            continue
        meanings.append(
            (word, f"To {word} means to {text}." if part == "verb" else f"{_capitalised(word)} means {text}.")
        )
        if len(meanings) == n_words:
            break
    return meanings


def _glosses(folder: Path) -> Iterator[tuple[tuple[str, str], tuple[list[str], str]]]:
    for part in ("noun", "verb"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            head, gloss = line.split("|", 1)
            fields = head.split()
            lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield (part, fields[0]), (lemmas, gloss)


def meaning_facts(meanings: list[tuple[str, str]], core: bool) -> Iterator[Fact]:
    """What words mean, from (word, sentence) pairs."""
    for word, sentence in meanings:
        yield Fact(
            "definition",
            word,
            sentence,
            fill(MEANING_QUESTIONS, word),
            MEANING_HELD_OUT.format(word),
            sentence,
            f"The user asks what {word} means. I explain the word {word}.",
            core,
        )
