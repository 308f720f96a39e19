"""Asks the evaluation's questions through localrun's own engine: official checkpoint -> conversion -> experts -> chat.

Usage: python -m tools.demo_model.engine_evaluation MODEL --questions QUESTIONS.json --out RESULTS.json --chats CHATS.md
Needs localrun's environment, not PyTorch. `tools.demo_model questions` writes the questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Delta, Generate
from tools.demo_model.dialogue import Dialogue
from tools.demo_model.evaluate import MAX_ANSWER_TOKENS, SAMPLE_CHATS, Question, ask, chat, core_score
from tools.demo_model.tokenizer import END_THINK


class EngineTalker:
    """Answers through a loaded `EngineProcess`, always the most likely token."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine

    def answer(self, dialogues: Sequence[Dialogue]) -> list[str]:
        return [self._answer(dialogue) for dialogue in dialogues]

    def _answer(self, dialogue: Dialogue) -> str:
        messages: list[dict[str, Any]] = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
        for turn in dialogue.turns[:-1]:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        messages.append({"role": "user", "content": dialogue.turns[-1].question})
        thinks = dialogue.turns[-1].thought is not None
        command = Generate(
            messages=tuple(messages),
            think="high" if thinks else "off",
            sampling=SamplingOptions(temperature=0.0),
            max_tokens=MAX_ANSWER_TOKENS,
        )
        said = {"thinking": "", "text": ""}
        for event in self._engine.generate(command):
            if isinstance(event, Delta):
                said[event.kind] += event.text
        return (said["thinking"] + END_THINK if thinks else "") + said["text"]


def chats_page(chats: list[list[tuple[str, str]]], thinking: list[list[tuple[str, str]]]) -> str:
    """The sample chats as Markdown, unedited."""
    lines = ["# Twenty chats with the demo model", "", "Unedited, always the most likely token, thinking off.", ""]
    for number, said in enumerate(chats, 1):
        lines += [f"## {number}", ""]
        for question, answer in said:
            lines += [f"> **You:** {question}", ">", f"> **Model:** {answer}", ">"]
        lines[-1] = ""
    lines += ["# The first questions again, in think mode", ""]
    for said in thinking:
        question, answer = said[0]
        reasoning, _, text = answer.partition(END_THINK)
        lines += [f"> **You:** {question}", ">", f"> *{reasoning}*", ">", f"> **Model:** {text}", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.engine_evaluation", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chats", type=Path, required=True, help="Markdown page of sample chats")
    options = parser.parse_args()
    raw = json.loads(options.questions.read_text(encoding="utf-8"))
    questions = [Question(**{**entry, "expected": tuple(entry["expected"])}) for entry in raw]
    with EngineProcess() as engine:
        for _ in engine.load(options.model, EngineOptions(n_ctx=2048, n_threads=1)):
            pass
        talker = EngineTalker(engine)
        scores, wrong = ask(talker, questions)
        chats = [chat(talker, asked) for asked in SAMPLE_CHATS]
        thinking = [chat(talker, asked[:1], think=True) for asked in SAMPLE_CHATS[:8]]
    results = {
        "core": asdict(core_score(scores, questions)),
        "topics": {topic: asdict(score) for topic, score in sorted(scores.items())},
        "wrong": [[question.text, said] for question, said in wrong],
    }
    options.chats.write_text(chats_page(chats, thinking), encoding="utf-8")
    options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(results["core"]))


if __name__ == "__main__":
    main()
