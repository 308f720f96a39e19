"""Mixes facts, small talk, sums, stories and refusals into conversations of one or several turns.

Facts come from shuffled decks, so that each is met equally often. About a third of the conversations have several turns, some
of which lean on earlier ones ("And its atomic number?", "What is my name?"); about a fifth show their reasoning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tools.demo_model import arithmetic, smalltalk, stories
from tools.demo_model.dialogue import Dialogue, Turn
from tools.demo_model.facts import CONTINENT_QUESTIONS, Fact
from tools.demo_model.knowledge_base import Knowledge

T = TypeVar("T")

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "You are the demo model of localrun.",
)
PREFIXES = (
    "Please: ",
    "Hey, ",
    "Hi! ",
    "Hello. ",
    "Quick question: ",
    "Tell me, ",
    "Well, ",
    "OK, ",
    "Now ",
    "And ",
    "I want to know: ",
)
SUFFIXES = (" please", " Please.", " Thanks.", " Thank you!")
SHARES = {
    "fact": 0.40,
    "small talk": 0.19,
    "localrun": 0.09,
    "sum": 0.19,
    "story": 0.03,
    "unknown": 0.03,
    "chain": 0.07,
}
FIRST_NAMES = (
    stories.BOYS
    + stories.GIRLS
    + [
        "Peter",
        "Laura",
        "David",
        "Sarah",
        "Ali",
        "Chen",
        "Maria",
        "Carlos",
        "Julia",
        "Hans",
        "Olga",
        "Yuki",
        "Amir",
        "Eva",
    ]
)


class Deck(Generic[T]):
    """Deals items in random order, all of them before any comes again."""

    def __init__(self, items: Sequence[T], rng: random.Random) -> None:
        self._items, self._rng, self._left = list(items), rng, list[T]()

    def deal(self) -> T:
        if not self._left:
            self._left = self._items[:]
            self._rng.shuffle(self._left)
        return self._left.pop()


class Conversations:
    """Draws training conversations; the same seed gives the same row of conversations."""

    def __init__(self, known: Knowledge, seed: int) -> None:
        self.rng = random.Random(seed)
        core = [fact for fact in known.facts if fact.core]
        # core facts come twice in a deck
        self._facts = Deck([*core, *known.facts], self.rng)
        self._small_talk = Deck(smalltalk.small_talk(), self.rng)
        self._localrun = Deck(smalltalk.about_localrun(), self.rng)
        self._beyond = Deck(smalltalk.unanswerable(), self.rng)
        self._countries = Deck(known.countries, self.rng)
        self._elements = Deck(known.elements, self.rng)
        self._opposites = Deck([f for f in known.facts if f.topic == "opposite"], self.rng)
        self._facts_of = {(fact.topic, fact.subject): fact for fact in known.facts}
        self._makers: dict[str, Callable[[], list[Turn]]] = {
            "fact": lambda: [self._fact_turn(self._facts.deal())],
            "small talk": lambda: [self._intent_turn(self._small_talk.deal())],
            "localrun": lambda: [self._intent_turn(self._localrun.deal())],
            "sum": lambda: [self._sum_turn(arithmetic.draw(self.rng))],
            "story": self._story,
            "unknown": self._unknown,
            "chain": self._chain,
        }

    def draw(self, n_parts: int | None = None) -> Dialogue:
        """One conversation (of `n_parts` topics, else mostly one); the last turn keeps its reasoning in a fifth of the cases."""
        rng = self.rng
        n_parts = n_parts or (1 if rng.random() < 0.68 else rng.randint(2, 5))
        turns: list[Turn] = []
        for _ in range(n_parts):
            kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
            turns += self._makers[kind]()
        if rng.random() < (0.3 if n_parts > 1 else 0.04):
            turns = self._with_introduction(turns)
        if rng.random() >= 0.2:
            turns[-1] = Turn(turns[-1].question, turns[-1].answer)
        system = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.12 else ""
        return Dialogue(turns, system)

    def _vary(self, question: str) -> str:
        """The question as hurried people type it: no capitals, no question mark, a word before or after."""
        rng = self.rng
        if rng.random() < 0.10:
            prefix = rng.choice(PREFIXES)
            question = prefix + (question if prefix[-2] in ".!:" else question[:1].lower() + question[1:])
        elif rng.random() < 0.04:
            question += rng.choice(SUFFIXES)
        if rng.random() < 0.15:
            question = question[:1].lower() + question[1:]
        if rng.random() < 0.12:
            question = question.rstrip("?.!")
        return question

    def _fact_turn(self, fact: Fact) -> Turn:
        return Turn(self._vary(self.rng.choice(fact.questions)), fact.answer, fact.thought)

    def _intent_turn(self, intent: smalltalk.Intent) -> Turn:
        question = self.rng.choice(intent.questions)
        if self.rng.random() < 0.2:
            question += self.rng.choice((".", "!", "?", "?"))
        return Turn(self._vary(question), self.rng.choice(intent.answers), intent.thought)

    def _sum_turn(self, problem: arithmetic.Sum) -> Turn:
        return Turn(problem.question(self.rng), problem.answer(), problem.thought())

    def _story(self) -> list[Turn]:
        rng = self.rng
        story = stories.make_story(rng)
        turns = [
            Turn(self._vary(story.request), story.text, f"The user wants a story. I tell one about {story.about}.")
        ]
        if rng.random() < 0.3:
            question = rng.choice(("What was the story about?", "Who was in the story?", "About what was this story?"))
            turns.append(Turn(question, f"It was about {story.about}.", f"The story was about {story.about}."))
        elif rng.random() < 0.2:
            turns.append(
                Turn(
                    rng.choice(("Did you like it?", "Is it true?")),
                    "I made it up, but I like it.",
                    "It was my own story.",
                )
            )
        return turns

    def _unknown(self) -> list[Turn]:
        rng = self.rng
        if rng.random() < 0.3:
            question = self._beyond.deal()
        else:
            name = smalltalk.invented_name([rng.randrange(97) for _ in range(rng.randint(2, 3))])
            question = rng.choice(smalltalk.UNKNOWN_QUESTIONS).format(name)
        return [
            Turn(self._vary(question), smalltalk.REFUSAL, "I do not know anything about that, and I should say so.")
        ]

    def _chain(self) -> list[Turn]:
        return self.rng.choice((self._country_chain, self._element_chain, self._sum_chain, self._opposite_chain))()

    def _country_chain(self) -> list[Turn]:
        rng, country = self.rng, self._countries.deal()
        turns = [self._fact_turn(self._facts_of[("capital", country.name)])]
        where = self._facts_of[("continent", country.name)]
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.5:
                follow_up = rng.choice(
                    (
                        "And where is it?",
                        "Which continent is it in?",
                        "And on which continent is that?",
                        "Where is that country?",
                    )
                )
                turns.append(Turn(follow_up, where.answer, where.thought))
            country = self._countries.deal()
            capital, where = (self._facts_of[(topic, country.name)] for topic in ("capital", "continent"))
            follow_up = rng.choice(
                (
                    "And the capital of {0}?",
                    "And of {0}?",
                    "What about {0}?",
                    "And {0}?",
                    "And what is the capital of {0}?",
                )
            )
            turns.append(Turn(follow_up.format(country.name), capital.answer, capital.thought))
        if rng.random() < 0.2:
            turns.append(Turn(rng.choice(CONTINENT_QUESTIONS).format("it"), where.answer, where.thought))
        return turns

    def _element_chain(self) -> list[Turn]:
        rng, element = self.rng, self._elements.deal()
        turns = [self._fact_turn(self._facts_of[("element symbol", element.name)])]
        number = self._facts_of[("atomic number", element.name)]
        if rng.random() < 0.7:
            question = rng.choice(
                ("And its atomic number?", "What is its atomic number?", "How many protons does it have?")
            )
            turns.append(Turn(question, number.answer, number.thought))
        else:
            symbol = self._facts_of[("element symbol", self._elements.deal().name)]
            question = rng.choice(("And of {0}?", "What about {0}?", "And {0}?", "And the symbol for {0}?")).format(
                symbol.subject
            )
            turns.append(Turn(question, symbol.answer, symbol.thought))
        return turns

    def _sum_chain(self) -> list[Turn]:
        rng, problem = self.rng, arithmetic.draw(self.rng)
        turns = [self._sum_turn(problem)]
        for _ in range(rng.randint(1, 2)):
            op = "+" if problem.result < 5 else rng.choice("+-")
            problem = arithmetic.Sum(problem.result, op, rng.randint(1, min(10, max(problem.result, 1))))
            word = {"+": "plus", "-": "minus"}[op]
            question = rng.choice((f"And {word} {problem.b}?", f"{word} {problem.b}?", f"And that {word} {problem.b}?"))
            turns.append(Turn(question, problem.answer(), problem.thought()))
        return turns

    def _opposite_chain(self) -> list[Turn]:
        first, second = self._opposites.deal(), self._opposites.deal()
        question = self.rng.choice(("And of {0}?", "What about {0}?", "And the opposite of {0}?", "And {0}?")).format(
            second.subject
        )
        return [self._fact_turn(first), Turn(question, second.answer, second.thought)]

    def _with_introduction(self, turns: list[Turn]) -> list[Turn]:
        """The user says a name or a favorite color first and asks for it at the end."""
        rng = self.rng
        if rng.random() < 0.65:
            # half of the names are invented, so that the name has to be copied from the text
            n_syllables = rng.randint(2, 3)
            invented = smalltalk.invented_name([rng.randrange(97) for _ in range(n_syllables)])
            name = rng.choice(FIRST_NAMES) if rng.random() < 0.5 else invented
            first = Turn(
                rng.choice(
                    ("My name is {0}.", "I am {0}.", "Hello, I am {0}.", "Hi, my name is {0}.", "I'm {0}")
                ).format(name),
                rng.choice(("Nice to meet you, {0}!", "Hello, {0}! How can I help you?", "Hi {0}!")).format(name),
            )
            asked = rng.choice(("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?"))
            last = Turn(asked, f"Your name is {name}.", f"The user said the name {name}.")
        else:
            color = rng.choice(
                ["red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "purple"]
            )
            first = Turn(
                rng.choice(
                    ("My favorite color is {0}.", "I like {0} best of all colors.", "I love the color {0}.")
                ).format(color),
                f"That is a nice color. I like {color} too.",
            )
            asked = rng.choice(("What is my favorite color?", "Which color do I like?", "What's my favorite color?"))
            last = Turn(asked, f"Your favorite color is {color}.", f"The user said that it is {color}.")
        return [first, *turns, last]


def tokenizer_texts(known: Knowledge, seed: int, n_conversations: int) -> list[str]:
    """Conversation texts without the special tokens, for training the tokenizer."""
    source = Conversations(known, seed)
    texts = []
    for _ in range(n_conversations):
        for turn in source.draw().turns:
            texts += [turn.question, turn.answer, turn.thought or ""]
    return texts
