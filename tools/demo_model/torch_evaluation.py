"""Runs a model in PyTorch: greedy answers, the loss of a text, expert use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from localrun.alignment import align_up
from tools.demo_model.dialogue import Dialogue
from tools.demo_model.evaluate import MAX_ANSWER_TOKENS
from tools.demo_model.model import Batch, DemoModel


class TorchTalker:
    """Greedy decoding in PyTorch by recomputing the whole row for each token; many prompts at once."""

    def __init__(self, model: DemoModel, encoder: Tokenizer, n_rows: int = 64) -> None:
        self._model, self._encoder, self._n_rows = model, encoder, n_rows

    def answer(self, dialogues: Sequence[Dialogue]) -> list[str]:
        prompts = [self._encoder.encode(d.prompt(), add_special_tokens=False).ids for d in dialogues]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), self._n_rows):
            chosen = order[start : start + self._n_rows]
            with torch.inference_mode():
                completed = self._complete([prompts[i] for i in chosen])
            for i, ids in zip(chosen, completed, strict=True):
                answers[i] = self._encoder.decode(ids, skip_special_tokens=True)
        return answers

    def _complete(self, prompts: list[list[int]]) -> list[list[int]]:
        rows, done = [list(p) for p in prompts], [False] * len(prompts)
        for _ in range(MAX_ANSWER_TOKENS):
            active = [i for i in range(len(rows)) if not done[i]]
            if not active:
                break
            length = align_up(max(len(rows[i]) for i in active), 4)
            ids = torch.tensor([rows[i] + [2] * (length - len(rows[i])) for i in active])
            hidden, _ = self._model(Batch(ids, torch.zeros_like(ids)))
            last = torch.tensor([k * length + len(rows[i]) - 1 for k, i in enumerate(active)])
            for i, token in zip(active, self._model.logits(hidden[last]).argmax(-1).tolist(), strict=True):
                rows[i].append(token)
                done[i] = token == 1
        return [[t for t in row[len(p) :] if t != 1] for row, p in zip(rows, prompts, strict=True)]


@dataclass(frozen=True)
class TextLoss:
    """Mean loss over a text in nats per token, and what follows from it."""

    nats_per_token: float
    tokens: int
    n_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats_per_token * self.tokens / self.n_bytes / math.log(2)

    @property
    def perplexity_per_byte(self) -> float:
        return math.exp(self.nats_per_token * self.tokens / self.n_bytes)


def text_loss(model: DemoModel, encoder: Tokenizer, text: str, length: int = 1024) -> tuple[TextLoss, list[list[int]]]:
    """Loss of every token of `text`, in windows of `length` that each start with BOS; and expert use by layer."""
    ids = encoder.encode(text, add_special_tokens=False).ids
    total, counts = 0.0, [[0] * model.config.n_routed_experts for _ in range(model.config.num_hidden_layers)]
    for start in range(0, len(ids), length - 1):
        window = torch.tensor([[0, *ids[start : start + length - 1]]])
        with torch.inference_mode():
            hidden, statistics = model(Batch(window, torch.zeros_like(window)))
            total += float(functional.cross_entropy(model.logits(hidden[:-1]), window[0, 1:], reduction="sum"))
        counts = [
            [a + int(b) for a, b in zip(row, new, strict=True)]
            for row, new in zip(counts, statistics.expert_counts, strict=True)
        ]
    return TextLoss(total / len(ids), len(ids), len(text.encode())), counts
