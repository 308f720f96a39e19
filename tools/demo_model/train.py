"""The training loop: two processes with one thread each, weights and gradients in shared memory.

On a machine whose cores others use as well, two independent threads lose far less time than one process whose threads meet at
every operation. Each process computes gradients on its own batch; then each updates its share of the tensors (f32 masters
that only it holds) and publishes them, in bf16 for matrices. In the last stage what it publishes is rounded to the official
FP4, FP8 and BF16 values, so that the gradient is taken at the weights that the exported checkpoint will have
(straight-through estimate).

Every few minutes each process saves its share; a restart goes on from there.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_model.corpus import BatchSource, ProseText, TrainingBatch
from tools.demo_model.kernels import Kernels
from tools.demo_model.knowledge_base import Knowledge
from tools.demo_model.model import DemoModel, ModelConfig, Statistics, parameter_shapes
from tools.demo_model.optimizer import MixedOptimizer, is_matrix
from tools.demo_model.quantization import rounded

N_PROCESSES = 2
ROWS, LENGTH = 8, 256
LONG_EVERY, LONG_ROWS, LONG_LENGTH = 12, 2, 1024
"""Every 12th step trains on rows of 1,024 tokens, with as many tokens in all."""
INDEXER_EVERY = 4
"""The indexer runs and learns in every 4th step (all long ones): in short rows it hardly ever has to choose."""
BIAS_STEP = 8e-3
INDEX_LOSS_WEIGHT = 0.2
SAVE_EVERY_S = 240.0
TRAINING_SINKHORN_ROUNDS = 6


@dataclass(frozen=True)
class Plan:
    """What the run does, by progress p in [0, 1).

    Attributes:
        n_steps: optimiser steps in all.
        chat_from: until here the mix has much prose, the loss covers prompts, and ratio-4 layers see all rows.
        quantised_from: from here on weights are rounded to the official formats.
        pause_file: while this file exists, training waits.
    """

    n_steps: int
    chat_from: float = 0.12
    quantised_from: float = 0.85
    matrix_rate: float = 4e-3
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    pause_file: Path | None = None

    def rate_scale(self, step: int) -> float:
        """Warm-up over 40 steps, constant to 45 %, then linear to 3 %."""
        p = step / self.n_steps
        return min(1.0, (step + 1) / 40) * (1.0 if p < 0.45 else 0.03 + 0.97 * max(0.0, 1 - p) / 0.55)

    def stage(self, step: int) -> str:
        p = step / self.n_steps
        return "mixed" if p < self.chat_from else "chat" if p < self.quantised_from else "quantised"


class Shared:
    """What both processes see: published weights, gradients, router statistics, and the barrier between phases."""

    def __init__(self, config: ModelConfig, model: DemoModel) -> None:
        self.config = config
        self.weights = {key.replace("/", "."): p.detach() for key, p in model.weights.items()}
        for name, w in self.weights.items():
            if is_matrix(name) or name == "head.weight":
                self.weights[name] = w.to(torch.bfloat16)
            self.weights[name].share_memory_()
        self.gradients = [
            {name: torch.zeros_like(w).share_memory_() for name, w in self.weights.items()} for _ in range(N_PROCESSES)
        ]
        self.biases = {layer: b.share_memory_() for layer, b in model.biases.items()}
        self.token_experts = model.token_experts
        self.counts = torch.zeros(N_PROCESSES, config.num_hidden_layers, config.n_routed_experts).share_memory_()
        self.losses = torch.zeros(N_PROCESSES, 3).share_memory_()
        self.owners = assign_owners(config)
        self.barrier = mp.get_context("fork").Barrier(N_PROCESSES)


def assign_owners(config: ModelConfig) -> dict[str, int]:
    """Shares the tensors out so that both processes have about as many parameters."""
    sizes = {name: int(torch.Size(shape).numel()) for name, shape in parameter_shapes(config).items()}
    load, owners = [0] * N_PROCESSES, {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        owner = load.index(min(load))
        owners[name] = owner
        load[owner] += size
    return owners


def hash_table(config: ModelConfig, frequencies: Tensor, seed: int) -> Tensor:
    """Fixed experts of each token for a hash-routed layer (V, K): frequent tokens first, always to the least loaded experts."""
    generator = torch.Generator().manual_seed(seed)
    load = torch.rand(config.n_routed_experts, generator=generator)
    table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
    for token in frequencies.argsort(descending=True).tolist():
        noise = torch.rand(config.n_routed_experts, generator=generator) * (load.mean() * 0.05 + 1)
        chosen = (load + noise).topk(config.num_experts_per_tok, largest=False).indices
        table[token] = chosen
        load[chosen] += float(frequencies[token]) + 0.1
    return table


def batch_loss(model: DemoModel, batch: TrainingBatch) -> tuple[Tensor, Statistics]:
    """Weighted mean cross-entropy of the targets that count."""
    hidden, statistics = model(batch.batch)
    weights = batch.weights.flatten()
    rows = weights.nonzero().squeeze(1)
    losses = functional.cross_entropy(model.logits(hidden[rows]), batch.targets.flatten()[rows], reduction="none")
    return (losses * weights[rows]).sum() / weights[rows].sum(), statistics


class Worker:
    """One process's part of the run."""

    def __init__(self, rank: int, shared: Shared, plan: Plan, source: BatchSource, folder: Path) -> None:
        self.rank, self.shared, self.plan, self.source, self.folder = rank, shared, plan, source, folder
        self.model = DemoModel(shared.config)
        self.model.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(w) for name, w in shared.weights.items()}
        )
        self.model.biases, self.model.token_experts = shared.biases, shared.token_experts
        self.model.sinkhorn_rounds = TRAINING_SINKHORN_ROUNDS
        self.optimizer = MixedOptimizer(plan.matrix_rate, plan.other_rate, plan.weight_decay)
        own = [name for name, owner in shared.owners.items() if owner == rank]
        self.masters = {name: shared.weights[name].float().clone() for name in own}
        self.first_step = self._restore()
        self.saved_at = time.monotonic()

    def run(self) -> None:
        start, tokens = time.monotonic(), 0
        for step in range(self.first_step, self.plan.n_steps):
            self._wait_while_paused()
            stage = self.plan.stage(step)
            loss, index_loss = self._gradients(step, stage)
            self.shared.losses[self.rank] = torch.tensor([loss, index_loss, 0.0])
            self.shared.barrier.wait()
            self._update(step, stage)
            self.shared.barrier.wait()
            tokens += N_PROCESSES * ROWS * LENGTH
            if self.rank == 0:
                self._log(step, stage, tokens / (time.monotonic() - start))
            self._save_if_due(step + 1)
        self._save(self.plan.n_steps)

    def _wait_while_paused(self) -> None:
        while self.plan.pause_file is not None and self.plan.pause_file.exists():
            time.sleep(1)

    def _gradients(self, step: int, stage: str) -> tuple[float, float]:
        long = step % LONG_EVERY == LONG_EVERY - 1
        rows, length = (LONG_ROWS, LONG_LENGTH) if long else (ROWS, LENGTH)
        # share of prose rows; loss weights of prompts and of prose
        shares = (0.25, 0.2, 1.0) if stage == "mixed" else (0.05, 0.0, 0.25)
        self.model.use_indexer = self._trains_indexer(step)
        self.model.select_rows = stage != "mixed"
        loss, statistics = batch_loss(self.model, self.source.batch(rows, length, *shares))
        (loss + INDEX_LOSS_WEIGHT * statistics.index_loss).backward()
        for key, parameter in self.model.weights.items():
            if parameter.grad is not None:
                self.shared.gradients[self.rank][key.replace("/", ".")].copy_(parameter.grad)
                parameter.grad = None
        self.shared.counts[self.rank] = torch.stack([c.float() for c in statistics.expert_counts])
        return float(loss.detach()), float(statistics.index_loss.detach())

    @staticmethod
    def _trains_indexer(step: int) -> bool:
        return step % INDEXER_EVERY == INDEXER_EVERY - 1

    def _update(self, step: int, stage: str) -> None:
        """Steps this process's tensors with the mean gradient and publishes them."""
        scale = self.plan.rate_scale(step)
        for name, master in self.masters.items():
            if ".indexer." in name and not self._trains_indexer(step):
                continue
            first, second = (self.shared.gradients[rank][name] for rank in range(N_PROCESSES))
            self.optimizer.step(name, master, (first + second).mul_(0.5), scale, step + 1)
            self.shared.weights[name].copy_(rounded(name, master) if stage == "quantised" else master)
        if self.rank == 0:
            counts = self.shared.counts.sum(0)
            for layer, bias in self.shared.biases.items():
                bias += BIAS_STEP * scale * torch.sign(counts[layer].mean() - counts[layer])

    def _log(self, step: int, stage: str, tokens_per_s: float) -> None:
        loss, index_loss, _ = self.shared.losses.mean(0).tolist()
        counts = self.shared.counts.sum(0)
        record = {
            "step": step,
            "stage": stage,
            "loss": round(loss, 4),
            "index_loss": round(index_loss, 4),
            "tokens": (step + 1) * N_PROCESSES * ROWS * LENGTH,
            "tokens_per_s": round(tokens_per_s, 1),
            "busiest_expert": [round(float(c.max() / c.mean()), 2) for c in counts],
            "rate": round(self.plan.rate_scale(step), 4),
            "long": step % LONG_EVERY == LONG_EVERY - 1,
        }
        with (self.folder / "losses.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")

    def _save_if_due(self, next_step: int) -> None:
        due = torch.tensor(float(time.monotonic() - self.saved_at > SAVE_EVERY_S))
        self.shared.losses[self.rank, 2] = due
        self.shared.barrier.wait()
        anyone = bool(self.shared.losses[:, 2].any())
        self.shared.barrier.wait()
        if anyone:
            self._save(next_step)

    def _save(self, next_step: int) -> None:
        """Both processes write their shares under a new name; the first then names the state the last one."""
        state: dict[str, Any] = {"step": next_step, "masters": self.masters, "optimizer": self.optimizer.state}
        state |= {"biases": self.shared.biases, "token_experts": self.shared.token_experts}
        path = self.folder / f"state-{next_step}-{self.rank}.pt"
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
        self.shared.barrier.wait()
        if self.rank == 0:
            (self.folder / "last.partial").write_text(str(next_step), encoding="utf-8")
            (self.folder / "last.partial").rename(self.folder / "last")
            for old in self.folder.glob("state-*.pt"):
                if old.name.split("-")[1] != str(next_step):
                    old.unlink()
        self.saved_at = time.monotonic()

    def _restore(self) -> int:
        if not (self.folder / "last").exists():
            return 0
        step = int((self.folder / "last").read_text(encoding="utf-8"))
        state = torch.load(self.folder / f"state-{step}-{self.rank}.pt")
        self.masters, self.optimizer.state = state["masters"], state["optimizer"]
        for name, master in self.masters.items():
            self.shared.weights[name].copy_(rounded(name, master) if self.plan.stage(step) == "quantised" else master)
        if self.rank == 0:
            for layer, bias in self.shared.biases.items():
                bias.copy_(state["biases"][layer])
        return step


def _work(
    rank: int, shared: Shared, plan: Plan, known: Knowledge, novels: list[ProseText], encoder: Tokenizer, folder: Path
) -> None:
    torch.set_num_threads(1)
    Kernels.compile()
    step = (folder / "last").read_text(encoding="utf-8") if (folder / "last").exists() else "0"
    source = BatchSource(known, novels, encoder, seed=1000 * int(step) + rank)
    worker = Worker(rank, shared, plan, source, folder)
    shared.barrier.wait()
    try:
        worker.run()
    except BaseException:
        shared.barrier.abort()  # the other process stops too, rather than waiting for ever
        raise


def train(
    config: ModelConfig, plan: Plan, known: Knowledge, novels: list[ProseText], encoder: Tokenizer, folder: Path
) -> None:
    """Runs or resumes training in `folder`; ends with `state-<n_steps>-<rank>.pt` files."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    torch.manual_seed(17)
    folder.mkdir(parents=True, exist_ok=True)
    model = DemoModel(config)
    sample = BatchSource(known, novels, encoder, seed=99).batch(160, LENGTH, 0.2, 0.0)
    frequencies = torch.bincount(sample.batch.ids.flatten(), minlength=config.vocab_size).float()
    for layer in model.token_experts:
        model.token_experts[layer] = hash_table(config, frequencies, seed=layer)
    shared = Shared(config, model)
    context = mp.get_context("fork")
    workers = [
        context.Process(target=_work, args=(rank, shared, plan, known, novels, encoder, folder))
        for rank in range(N_PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"training stopped; {folder}/last names the state from which the same command goes on")


def load_trained(config: ModelConfig, folder: Path, compute: torch.dtype = torch.float32) -> DemoModel:
    """The f32 masters of the last saved state as a model."""
    model = DemoModel(config, compute)
    step = (folder / "last").read_text(encoding="utf-8")
    with torch.no_grad():
        for rank in range(N_PROCESSES):
            state = torch.load(folder / f"state-{step}-{rank}.pt")
            for name, master in state["masters"].items():
                model.weights[name.replace(".", "/")].copy_(master)
            model.biases, model.token_experts = state["biases"], state["token_experts"]
    return model
