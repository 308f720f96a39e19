"""What the interface says about the demo model, which is a toy."""

from __future__ import annotations

DEMO_WORDS = (
    "This is the demo: a toy model with 33 million parameters. It knows capitals,\n"
    "elements, small sums and stories, and shows how localrun works.\n"
    "For a real model: Ctrl+L.\n\n"
    "Tab puts one of these into the input:\n"
)
DEMO_QUESTIONS = ("What can you do?", "Tell me a story about a fox.", "What is an expert?")

DEMO_NOTE = (
    "a toy model with 33 million parameters wrote this: it knows capitals, elements, small sums and stories, "
    "and makes up the rest; Ctrl+L loads a real model"
)
"""Below the first answer of a conversation, unless the question was one of those that are offered."""

DEMO_NOTE_AGAIN = "a toy wrote this; Ctrl+L: real models"
"""Below later answers."""
