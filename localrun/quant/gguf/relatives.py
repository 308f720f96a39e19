"""Recognizes GGUFs that accompany models: drafters, image encoders, importance matrices, adapters, other generations.

Identifies a file by its keys and tensor names, and names the file to use instead. localrun runs an allow-list: the text
architectures for which the bundled llama.cpp (0c1e57098) creates stacks of routed experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from localrun.errors import UnsupportedModelError
from localrun.quant.gguf.value import GgufValue

Kind = Literal["drafter", "image encoder", "importance matrix", "adapter", "vocabulary", "other"]

_NAMES = """
afmoe arctic bailingmoe bailingmoe2 bailingmoe3 cohere2moe dbrx deepseek deepseek2 deepseek2-ocr deepseek32 deepseek4 dots1
dots3note ernie4_5 ernie4_5-moe exaone-moe gemma4 glm-dsa glm4moe glm5-next gpt-oss granite granite_swa granitehybrid
granitemoe grok grovemoe hunyuan-moe hy_v3 hy_v4 jamba kimi-k3 kimi-linear laguna lfm2 lfm2moe llada-moe llama llama4 maple
mellum mimo2 minicpm minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 nemotron_h nemotron_h_moe olmoe paddleocr phimoe
qwen2moe qwen35moe qwen3moe qwen3next qwen3vlmoe qwen4exp refact rnd1 smallthinker step35
"""
MOE_ARCHITECTURES = frozenset(_NAMES.split())

_DRAFTER_ARCH = re.compile(r"(^|[-_0-9])(dflash|dspark|eagle[0-9]*|draft(er)?|mtp|nextn|assistant|speculator)($|[-_.])")
_DRAFTER_TENSORS = ("markov_w1.", "markov_w2.", "conf_proj.", "markov_head.", "enc.output_norm.", "mtp.")
_V41 = re.compile(r"deepseek[-_]?(v)?4[._]?1")


class Relative(NamedTuple):
    """A file that is not a chat model.

    Attributes:
        kind: kind of file.
        what: the same as a phrase to follow the file's name.
        hint: which file to use.
    """

    kind: Kind
    what: str
    hint: str

    def error(self, path: Path) -> UnsupportedModelError:
        return UnsupportedModelError(f"{path}: {self.what}", hint=self.hint)


def relative_of(metadata: Mapping[str, GgufValue], tensors: Iterable[str]) -> Relative | None:
    """What the file is if it is not a model of an architecture that localrun may run; None: it may be one."""
    architecture, kind = _text(metadata, "general.architecture"), _text(metadata, "general.type")
    names = list(tensors)
    if kind == "mmproj" or architecture == "clip":
        return Relative("image encoder", "an image encoder (mmproj), not a language model", _MAIN)
    if kind == "imatrix" or any(name.endswith(".in_sum2") for name in names):
        return Relative(
            "importance matrix",
            "an importance matrix (imatrix), not a model",
            "pass the model; this file is for 'localrun convert --imatrix'",
        )
    if kind == "adapter" or any(name.endswith(".lora_a") for name in names):
        return Relative("adapter", "an adapter (LoRA), not a model", "localrun does not support adapters: " + _MAIN)
    if kind == "vocab":
        return Relative("vocabulary", "a vocabulary without weights", _MAIN)
    if _V41.fullmatch(architecture):
        return Relative(
            "other",
            f"DeepSeek-V4.1 (architecture '{architecture}'), a different architecture from DeepSeek-V4",
            "localrun runs DeepSeek-V4-Flash and V4-Pro: use a GGUF of one of those",
        )
    drafts = _DRAFTER_ARCH.search(architecture) is not None
    if drafts or any(name.startswith(_DRAFTER_TENSORS) for name in names):
        return Relative(
            "drafter",
            f"a drafter (architecture '{architecture}'), which only drafts tokens for the model it belongs to",
            _MAIN,
        )
    if architecture and architecture not in MOE_ARCHITECTURES:
        return Relative(
            "other",
            f"architecture '{architecture}' is not one that localrun runs",
            "localrun runs mixture-of-experts models that its llama.cpp knows; others run in llama.cpp itself",
        )
    return None


_MAIN = "pass the main model's file"


def _text(metadata: Mapping[str, GgufValue], key: str) -> str:
    value = metadata.get(key)
    return value.value if value is not None and isinstance(value.value, str) else ""
