"""`localrun eval`: what it takes for token ids, and which options go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrun import cli
from localrun.commands.eval import _read_tokens
from localrun.errors import UsageError
from tests.engine.models import write_chat_model


def test_token_ids_are_a_list_of_whole_numbers(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[1, 2, 30]")
    assert _read_tokens(tmp_path / "ids.json") == (1, 2, 30)


@pytest.mark.parametrize("text", ["[]", "{}", "3", "[1, 2.5]", '["1"]', "[true]", "[[1]]"])
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids.json").write_text(text)
    with pytest.raises(UsageError, match="expected a JSON list of token ids"):
        _read_tokens(tmp_path / "ids.json")


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[1,")
    with pytest.raises(UsageError, match=r"ids\.json: not JSON"):
        _read_tokens(tmp_path / "ids.json")
    with pytest.raises(UsageError, match=r"absent\.json: No such file"):
        _read_tokens(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokens", "ids.json"], "--tokens needs --logits"),
        (["--text", "book.txt", "--logits", "out.npy"], "--logits needs --tokens"),
        (["--tokens", "ids.json", "--text", "book.txt"], "not allowed with"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_chat_model(tmp_path / "chat.gguf")
    assert cli.main(["eval", str(model), *arguments]) == 2
    assert says in capsys.readouterr().err
