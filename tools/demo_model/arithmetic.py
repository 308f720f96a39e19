"""Small sums: questions in many wordings, short answers, and worked steps for think mode."""

from __future__ import annotations

import random
from dataclasses import dataclass

PLUS = (
    "What is {a} plus {b}?",
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "What is {a}+{b}?",
    "Calculate {a} + {b}.",
    "what's {a} + {b}",
)
MINUS = (
    "What is {a} minus {b}?",
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} = ?",
    "Subtract {b} from {a}.",
    "How much is {a} minus {b}?",
    "Calculate {a} - {b}.",
)
TIMES = (
    "What is {a} times {b}?",
    "What is {a} x {b}?",
    "{a} x {b}",
    "{a} * {b}",
    "{a} x {b} = ?",
    "Multiply {a} by {b}.",
    "How much is {a} times {b}?",
    "Calculate {a} x {b}.",
)
HELD_OUT = {
    "+": "Can you work out {a} plus {b}?",
    "-": "Can you work out {a} minus {b}?",
    "x": "Can you work out {a} times {b}?",
}
_TEMPLATES = {"+": PLUS, "-": MINUS, "x": TIMES}


@dataclass(frozen=True)
class Sum:
    """a `op` b with op one of + - x."""

    a: int
    op: str
    b: int

    @property
    def result(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "x": self.a * self.b}[self.op]

    @property
    def held_out(self) -> bool:
        """Whether training must not see this sum: about one sum of two-digit numbers in thirty."""
        return max(self.a, self.b) > 10 and (self.a * 31 + self.b * 17 + ord(self.op)) % 30 == 0

    def question(self, rng: random.Random) -> str:
        return rng.choice(_TEMPLATES[self.op]).format(a=self.a, b=self.b)

    def answer(self) -> str:
        return f"{self.a} {self.op} {self.b} = {self.result}."

    def thought(self) -> str:
        """The steps a person would write: tens and ones for additions beyond 20, else just the sum."""
        a, b = self.a, self.b
        if self.op == "+" and a > 9 and b > 9:
            tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
            return f"{a // 10 * 10} + {b // 10 * 10} = {tens}. {a % 10} + {b % 10} = {ones}. {tens} + {ones} = {self.result}."
        if self.op == "x" and min(a, b) > 1:
            return f"{a} x {b - 1} = {a * (b - 1)}. {a * (b - 1)} + {a} = {self.result}."
        return f"I need {a} {self.op} {b}. That is {self.result}."


def draw(rng: random.Random) -> Sum:
    """A sum for training: half with numbers up to 10, the rest additions and subtractions up to 50."""
    while True:
        op = rng.choice("++--x")
        limit = 10 if op == "x" or rng.random() < 0.5 else 50
        a, b = rng.randint(0, limit), rng.randint(0, limit)
        if op == "-" and a < b:
            a, b = b, a
        problem = Sum(a, op, b)
        if not problem.held_out:
            return problem
