"""Models shared by the engine's tests: written once per run, loaded on one thread because test machines are busy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp as L
import pytest

from localrun.engine.engine import Engine
from localrun.engine.llama import Vocab
from localrun.engine.measure.stock import without_gpus
from localrun.engine.options import EngineOptions
from localrun.engine.tokenizer import Tokenizer
from localrun.ggml import log as llama_log
from tests.engine.models import write_chat_model, write_vocab_only
from tests.gguf_models import TinyDeepseek4, write_deepseek4

OPTIONS = EngineOptions(n_ctx=1024, n_batch=64, n_threads=1, ram_bytes=64 * 2**20)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    return write_deepseek4(folder / "model.gguf", TinyDeepseek4(ratios=(0, 4, 128, 4), n_experts=16, n_used=3))[0]


@pytest.fixture(scope="session")
def chat_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that understands text."""
    return write_chat_model(tmp_path_factory.mktemp("model") / "chat.gguf")


@pytest.fixture(scope="session")
def engine(model_path: Path) -> Iterator[Engine]:
    """The model without a tokenizer, experts on our device."""
    with Engine.open(model_path, OPTIONS) as engine:
        yield engine


def load_vocab(path: Path) -> tuple[Any, Vocab]:
    """A GGUF's vocabulary alone; the model is to be freed by the caller."""
    llama_log.install()
    params = L.llama_model_default_params()
    without_gpus(params)  # tests of GPUs leave dead ones behind
    params.vocab_only = True
    model = L.llama_model_load_from_file(str(path).encode(), params)
    assert model, llama_log.recent_errors()
    return model, Vocab(model)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """V4's tokenizer from a GGUF as our converter writes it."""
    model, vocab = load_vocab(write_vocab_only(tmp_path_factory.mktemp("vocab") / "vocab.gguf"))
    yield Tokenizer(vocab)
    L.llama_model_free(model)
