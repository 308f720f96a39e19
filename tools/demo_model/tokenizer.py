"""The demo model's tokenizer: a byte-level BPE of its own with DeepSeek-V4's pre-tokenizer and special-token strings.

Digits stay single tokens (no merge holds a digit), which small sums need. The pre-tokenizer is V4's sequence of regular
expressions, so llama.cpp's `joyai-llm` pre-tokenizer yields the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
CONTROL_TOKENS = (BOS, EOS, PAD)
"""Special tokens with ids 0, 1, 2."""
ROLE_TOKENS = (
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
"""Added tokens with special=false, normalized=true, as in V4's tokenizer.json; the last ids of the vocabulary."""

_NUMBERS = r"\p{N}{1,3}"
_EAST_ASIAN = "[一-龥぀-ゟ゠-ヿ]+"
# V4's file holds the line-break characters themselves, not escapes
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^LINEBREAKS\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[LINEBREAKS]*|\s*[LINEBREAKS]+|\s+(?!\S)|\s+"
).replace("LINEBREAKS", "\r\n")


def _pre_tokenizer(numbers: str) -> pre_tokenizers.Sequence:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (numbers, _EAST_ASIAN, _WORDS)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer whose ids are 0..vocab_size-1: control tokens, bytes, merges, role tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(r"\p{N}")  # digits apart, so that no merge joins them
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ROLE_TOKENS),
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = _pre_tokenizer(_NUMBERS)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=True) for token in ROLE_TOKENS])
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 1048576,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
