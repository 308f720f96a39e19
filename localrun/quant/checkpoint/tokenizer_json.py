"""tokenizer.json (Hugging Face `tokenizers` format) as llama.cpp's tokenizer metadata.

Supports only byte-level BPE, which DeepSeek-V4 uses, and only pre-tokenizers that llama.cpp implements by name. They are
recognized by their exact regular expressions; anything else is rejected rather than tokenized slightly differently.

Token types follow llama.cpp's converter: added tokens that are special or look so (`<｜User｜>`, `<|EOT|>`) are CONTROL, other
added tokens (`<think>`, `｜DSML｜`) are USER_DEFINED. Notable departure: U+2581 in USER_DEFINED tokens is kept, as `tokenizers`
does.

Knows nothing about prompts beyond a small chat template for other programs; localrun's prompts come from `engine.chat`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from localrun.errors import FormatError
from localrun.quant.checkpoint.model_config import ModelConfig
from localrun.quant.checkpoint.safetensors import parse_json_object
from localrun.quant.gguf.file import GgufValue
from localrun.reading import read_small

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"

MAX_BYTES = 256 << 20
"""V4's file has 6.4 MB."""

_HINT = "move tokenizer.json away to convert without a tokenizer (usable by token ids only)"

_V4_REGEXES = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_QWEN2_REGEXES = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)
_GPT2_OWN_REGEX = ("ByteLevel",)

PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    _V4_REGEXES: "joyai-llm",
    _QWEN2_REGEXES: "qwen2",
    _GPT2_OWN_REGEX: "gpt-2",
}
"""Regular expressions of the Split steps, in order, to llama.cpp's `tokenizer.ggml.pre`; `ByteLevel` stands for its own."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set turn = namespace(user=false) -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {{- message.content or '' -}}
  {%- elif message.role == 'assistant' -%}
    {{- (message.content or '') + '<｜end▁of▁sentence｜>' -}}
    {%- set turn.user = false -%}
  {%- else -%}
    {{- ('\\n\\n' if turn.user else '<｜User｜>') -}}
    {{- ('<tool_result>' + (message.content or '') + '</tool_result>') if message.role == 'tool' else (message.content or '') -}}
    {%- set turn.user = true -%}
    {%- set reply = add_generation_prompt if loop.last else messages[loop.index].role == 'assistant' -%}
    {%- if reply -%}
      {{- '<｜Assistant｜>' + ('<think>' if loop.last and thinking else '</think>') -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""
"""A simple chat template like the official encoder (system, user, tool results, answers; no tool descriptions), for checkpoints
without one. `thinking` opens the answer with <think>."""


@dataclass(frozen=True, slots=True)
class TokenizerMetadata:
    """A converted tokenizer.

    Attributes:
        values: GGUF keys, `tokenizer.*`.
        warnings: for the user.
    """

    values: dict[str, GgufValue]
    warnings: tuple[str, ...]


def tokenizer_metadata(folder: Path, config: ModelConfig) -> TokenizerMetadata:
    """Reads a checkpoint's tokenizer files.

    Args:
        folder: holds tokenizer.json and, optionally, tokenizer_config.json and chat_template.jinja.
        config: for the vocabulary's size and the special tokens' ids.

    Returns:
        Keys for the GGUF; without a tokenizer.json the model `none` and a warning.

    Raises:
        FormatError: damaged files, or a tokenizer that llama.cpp would run differently.
        StoreError: one that can't be read.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        warning = f"{folder}: no {TOKENIZER_NAME}: the result takes token ids only, not text"
        return TokenizerMetadata({"tokenizer.ggml.model": GgufValue.string("none")}, (warning,))
    document = parse_json_object(path, read_small(path, MAX_BYTES, "a tokenizer"))
    pre = _pre_tokenizer(path, document)
    tokens, types = _vocabulary(path, document, config.vocab_size)
    merges = _merges(path, document)
    pad = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    settings_path = folder / CONFIG_NAME
    settings = (
        parse_json_object(settings_path, read_small(settings_path, MAX_BYTES, "a tokenizer"))
        if settings_path.is_file()
        else {}
    )
    values = {
        "tokenizer.ggml.model": GgufValue.string("gpt2"),
        "tokenizer.ggml.pre": GgufValue.string(pre),
        "tokenizer.ggml.tokens": GgufValue.strings(tokens),
        "tokenizer.ggml.token_type": GgufValue.array(GGUFValueType.INT32, types),
        "tokenizer.ggml.merges": GgufValue.strings(merges),
        "tokenizer.ggml.bos_token_id": GgufValue.uint32(config.bos_token_id),
        "tokenizer.ggml.eos_token_id": GgufValue.uint32(config.eos_token_id),
        "tokenizer.ggml.padding_token_id": GgufValue.uint32(pad),
        "tokenizer.ggml.add_bos_token": GgufValue.boolean(False),
        "tokenizer.ggml.add_eos_token": GgufValue.boolean(False),
        "tokenizer.chat_template": GgufValue.string(_template(folder, settings)),
    }
    return TokenizerMetadata(values, ())


def _refuse(path: Path, what: str) -> FormatError:
    return FormatError(f"{path}: {what}", hint=_HINT)


def _pre_tokenizer(path: Path, document: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer, after checking that nothing else changes the text before it."""
    normalizer = document.get("normalizer")
    if normalizer is not None and not (isinstance(normalizer, dict) and normalizer.get("normalizers") == []):
        raise _refuse(path, f"normalizer {json.dumps(normalizer)[:80]} is not supported by llama.cpp")
    pre = document.get("pre_tokenizer")
    steps = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise _refuse(path, "pre_tokenizer is not a sequence of steps")
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space") is not False:
        raise _refuse(path, "the pre-tokenizer does not end with ByteLevel without prefix space")
    regexes = [_split_regex(path, step) for step in steps[:-1]]
    if byte_level.get("use_regex", True):
        regexes.append("ByteLevel")
    name = PRE_TOKENIZERS.get(tuple(regexes))
    if name is None:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise _refuse(
            path, f"pre-tokenizer {str(regexes)[:160]} has no llama.cpp equivalent known to localrun ({known})"
        )
    return name


def _split_regex(path: Path, step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if step.get("type") != "Split" or not isinstance(regex, str):
        raise _refuse(path, f"pre-tokenizer step {json.dumps(step)[:80]} is not supported")
    if step.get("behavior") != "Isolated" or step.get("invert"):
        raise _refuse(path, f"pre-tokenizer step for {regex[:40]!r} does not isolate its matches")
    return regex


def _vocabulary(path: Path, document: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token texts and types by id, filled up to the model's vocabulary."""
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise _refuse(path, "the model is not BPE with a vocabulary")
    for key in (
        "byte_fallback",
        "ignore_merges",
        "fuse_unk",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "dropout",
    ):
        if model.get(key):
            raise _refuse(path, f"BPE with {key} is not what llama.cpp does for this pre-tokenizer")
    texts: dict[int, str] = {}
    for text, number in model["vocab"].items():
        _place(path, texts, text, number, vocab_size)
    types = dict.fromkeys(texts, int(TokenType.NORMAL))
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise _refuse(path, "added_tokens is not a list of tokens")
    for token in added:
        text, number = token.get("content"), token.get("id")
        _place(path, texts, text, number, vocab_size)
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise _refuse(path, f"added token {text!r} strips or needs word borders, which llama.cpp does not do")
        special = token.get("special") is True or _looks_special(str(text))
        types[int(str(number))] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    return _complete(path, texts, types, vocab_size)


def _place(path: Path, texts: dict[int, str], text: object, number: object, vocab_size: int) -> None:
    if not isinstance(text, str) or not text or type(number) is not int or number < 0:
        raise _refuse(path, f"token {str(text)[:40]!r} with id {str(number)[:40]} is not a token")
    if number >= vocab_size:
        raise _refuse(path, f"token {text[:40]!r} has id {number}, the model has {vocab_size} tokens")
    if texts.setdefault(number, text) != text:
        raise _refuse(path, f"id {number} is both {texts[number][:40]!r} and {text[:40]!r}")


def _complete(
    path: Path, texts: Mapping[int, str], types: Mapping[int, int], vocab_size: int
) -> tuple[list[str], list[int]]:
    used = set(texts.values())
    if len(used) != len(texts):
        raise _refuse(path, "two ids have the same text")
    try:
        "".join(used).encode()
    except UnicodeEncodeError as e:
        raise _refuse(path, f"a token is not Unicode text: {str(e)[:80]}") from e
    tokens = []
    for number in range(vocab_size):
        # A gap needs a text that no token has: llama.cpp ends the process on duplicates.
        filler = f"[PAD{number}]"
        while number not in texts and filler in used:
            filler += "_"
        tokens.append(texts.get(number, filler))
        used.add(tokens[-1])
    return tokens, [types.get(number, int(TokenType.UNUSED)) for number in range(vocab_size)]


def _looks_special(text: str) -> bool:
    """Spelled like a control token though not marked as one; the same spellings as in llama.cpp's converter."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(opening) and text.endswith(closing) for opening, closing in brackets)


def _merges(path: Path, document: Mapping[str, Any]) -> list[str]:
    """Merges as `left right`, from either spelling that the format has."""
    merges = document["model"].get("merges")
    if not isinstance(merges, list):
        raise _refuse(path, "the model has no list of merges")
    result = []
    for merge in merges:
        pair: Sequence[object] = (
            merge.split(" ") if isinstance(merge, str) else merge if isinstance(merge, list) else ()
        )
        if len(pair) != 2 or not all(isinstance(part, str) and part and " " not in part for part in pair):
            raise _refuse(path, f"merge {str(merge)[:60]!r} is not a pair of tokens")
        result.append(f"{pair[0]} {pair[1]}")
    try:
        "".join(result).encode()
    except UnicodeEncodeError as e:
        raise _refuse(path, f"a merge is not Unicode text: {str(e)[:80]}") from e
    return result


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    """The checkpoint's own chat template, or ours."""
    path = folder / TEMPLATE_NAME
    if path.is_file():
        try:
            return read_small(path, MAX_BYTES, "a chat template").decode("utf-8")
        except UnicodeDecodeError as e:
            raise _refuse(path, "is not UTF-8 text") from e
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if isinstance(template, str) and template:
        if any("\ud800" <= c <= "\udfff" for c in template):
            raise _refuse(folder / CONFIG_NAME, "chat_template is not Unicode text")
        return template
    return CHAT_TEMPLATE
