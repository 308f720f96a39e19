"""What PyTorch is needed for in the evaluation: float against exported weights, expert use; and the loss curve's picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tools.demo_model import checkpoint
from tools.demo_model.corpus import BatchSource
from tools.demo_model.knowledge_base import Knowledge
from tools.demo_model.model import DemoModel
from tools.demo_model.torch_evaluation import text_loss
from tools.demo_model.train import batch_loss, load_trained

N_CHAT_BATCHES = 12


def chat_loss(model: DemoModel, known: Knowledge, encoder: Tokenizer) -> tuple[float, list[list[int]]]:
    """Mean loss (nats per token) of the answers in freshly drawn conversations, and expert use by layer."""
    source = BatchSource(known, [], encoder, seed=777_777)
    total, counts = 0.0, torch.zeros(model.config.num_hidden_layers, model.config.n_routed_experts)
    with torch.inference_mode():
        for _ in range(N_CHAT_BATCHES):
            loss, statistics = batch_loss(model, source.batch(8, 256, 0.0, 0.0))
            total += float(loss)
            counts += torch.stack(statistics.expert_counts)
    return total / N_CHAT_BATCHES, counts.int().tolist()


def usage_summary(counts: list[list[int]]) -> list[dict[str, float]]:
    """Per layer: how unevenly the experts are used; shares in percent of all choices."""
    summary = []
    for layer in counts:
        total, ranked = sum(layer), sorted(layer)
        summary.append(
            {
                "unused": sum(c == 0 for c in layer),
                "least_percent": round(100 * ranked[0] / total, 3),
                "median_percent": round(100 * ranked[len(ranked) // 2] / total, 3),
                "most_percent": round(100 * ranked[-1] / total, 3),
                "busiest_quarter_percent": round(100 * sum(ranked[-len(ranked) // 4 :]) / total, 1),
            }
        )
    return summary


def compare(run: Path, exported: Path, known: Knowledge, encoder: Tokenizer, text: str) -> dict[str, Any]:
    """Losses of the f32 training weights and of the exported checkpoint, and the exported model's expert use."""
    float_model = load_trained(checkpoint.load(exported).config, run)
    exported_model = checkpoint.load(exported)
    results: dict[str, Any] = {}
    for name, model in (("float", float_model), ("exported", exported_model)):
        loss, text_counts = text_loss(model, encoder, text)
        answers, chat_counts = chat_loss(model, known, encoder)
        results[name] = {
            "text_nats_per_token": round(loss.nats_per_token, 4),
            "text_tokens": loss.tokens,
            "text_bytes": loss.n_bytes,
            "text_bits_per_byte": round(loss.bits_per_byte, 4),
            "text_perplexity_per_byte": round(loss.perplexity_per_byte, 4),
            "answer_nats_per_token": round(answers, 4),
        }
    results["expert_use"] = {
        "text": usage_summary(text_counts),
        "conversations": usage_summary(chat_counts),
        "conversation_counts": chat_counts,
    }
    return results


def draw_losses(log: Path, picture: Path) -> None:
    """The training loss by tokens, smoothed over 15 steps, with the stages shaded, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    latest: dict[int, dict[str, Any]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        latest[record["step"]] = record  # steps repeated after a restart count once
    records = [latest[step] for step in sorted(latest)]
    tokens = [r["tokens"] / 1e6 for r in records]
    losses = [r["loss"] for r in records]
    smooth = [sum(losses[max(0, i - 14) : i + 1]) / len(losses[max(0, i - 14) : i + 1]) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    axes.plot(tokens, losses, linewidth=0.5, alpha=0.4, color="tab:blue")
    axes.plot(tokens, smooth, linewidth=1.6, color="tab:blue", label="loss, mean of 15 steps")
    for stage, color in (("mixed", "0.92"), ("chat", "1.0"), ("quantised", "0.85")):
        inside = [t for t, r in zip(tokens, records, strict=True) if r["stage"] == stage]
        if inside:
            axes.axvspan(inside[0], inside[-1], color=color, zorder=-1)
            axes.text((inside[0] + inside[-1]) / 2, 0.02, stage, transform=axes.get_xaxis_transform(), ha="center")
    axes.set(xlabel="million tokens", ylabel="nats per token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
