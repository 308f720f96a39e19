"""What `import localrun` promises: names, types, errors; every example of docs/api.md and examples/ runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import localrun
from localrun.api import demo
from localrun.api.options import AnswerOptions, Limits, LoadOptions, given
from localrun.errors import LocalrunError, UsageError
from localrun.options import those
from tests.test_import_hygiene import HEAVY, loaded_after

pytestmark = pytest.mark.engine_process

ROOT = Path(__file__).parent.parent
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def model() -> Iterator[localrun.Model]:
    with localrun.load("demo", threads=1, context=2048, ram="256MiB", gpu="none") as model:
        yield model


def test_importing_it_loads_nothing_heavy_and_little_else() -> None:
    loaded = loaded_after("import localrun")
    assert loaded.isdisjoint({*HEAVY, "msgspec", "argparse", "dataclasses", "pathlib"}), loaded


def test_loading_a_model_takes_nothing_heavy_into_this_process() -> None:
    assert loaded_after("import localrun; localrun.load; localrun.Answer; localrun.Delta").isdisjoint(HEAVY)


def test_every_promised_name_is_there() -> None:
    assert all(getattr(localrun, name) is not None for name in localrun.__all__)
    assert set(localrun.__all__) <= set(dir(localrun))
    assert localrun.__all__ == sorted(localrun.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = localrun.nonsense


def test_options_are_the_declared_ones() -> None:
    engine = {option.name for option in those("engine")} - {"model"}
    assert set(LoadOptions.__annotations__) == engine
    assert set(Limits.__annotations__) <= engine
    assert set(AnswerOptions.__annotations__) == {option.name for option in those("sampling")}


def test_options_are_read_as_on_the_command_line_and_bytes_need_no_unit() -> None:
    assert given({"ram": "8GiB", "vram": 2**30, "threads": None})["ram"] == 8 << 30
    assert given({"vram": 2**30})["vram"] == 2**30
    with pytest.raises(UsageError, match="ram"):
        given({"ram": "8"})
    with pytest.raises(UsageError, match="temperature"):
        given({"temperature": -1})
    with pytest.raises(TypeError, match="unknown option 'heat'"):
        given({"heat": 1})


def test_an_answer_is_what_its_stream_was(model: localrun.Model) -> None:
    answer = model.ask("What is 12 + 30?", temperature=0, max_tokens=40)
    events = list(model.stream("What is 12 + 30?", temperature=0, max_tokens=40))
    pieces = [event.text for event in events if isinstance(event, localrun.Delta) and event.kind == "text"]
    assert str(answer) == answer.text == "".join(pieces)
    assert answer.finish_reason == "eos"
    end = events[-1]
    assert isinstance(end, localrun.Finished)
    assert end.timings.new_tokens == answer.timings.new_tokens
    assert answer.message == {"role": "assistant", "content": answer.text}


def test_a_system_message_comes_first_and_messages_are_whole(model: localrun.Model) -> None:
    question = {"role": "user", "content": "Hello"}
    n_tokens = model.count_tokens([{"role": "system", "content": "Be brief."}, question])
    assert model.ask("Hello", system="Be brief.", max_tokens=1).timings.prompt_tokens == n_tokens
    assert n_tokens > model.count_tokens([question]) > model.count_tokens("Hello") == len(model.tokenize("Hello"))


def test_leaving_a_stream_stops_the_answer(model: localrun.Model) -> None:
    stream = model.stream("Tell me a story.", max_tokens=2000)
    next(event for event in stream if isinstance(event, localrun.Delta))
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert model.ask("Hello", max_tokens=1).timings.new_tokens == 1


@pytest.mark.parametrize("tool", [TOOL, TOOL["function"]])
def test_a_required_call_is_of_a_tool_that_is_offered(model: localrun.Model, tool: dict[str, object]) -> None:
    answer = model.ask("Weather in Rome?", tools=[tool], tool_choice="required", temperature=0, max_tokens=60)
    assert {call.name for call in answer.tool_calls} == {"weather"}
    call = answer.message["tool_calls"][0]["function"]
    assert call == {"name": "weather", "arguments": answer.tool_calls[0].arguments}


def test_what_is_wrong_is_an_error_of_the_package(model: localrun.Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unsupported tool type 'browser'"):
        model.ask("Hello", tools=[{"type": "browser"}])
    with pytest.raises(LocalrunError, match="no such file"):
        localrun.load(tmp_path / "nothing.gguf")
    with pytest.raises(UsageError, match="unknown box 'castle'"):
        localrun.plan("flash", machine="castle")
    with pytest.raises(LocalrunError):
        localrun.convert(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert model.ask("Hello", max_tokens=1).text, "it can be asked again"


def test_a_closed_model_says_so() -> None:
    model = localrun.load("demo", threads=1, context=512)
    model.close()
    model.close()
    assert repr(model) == "<Model, closed>"
    with pytest.raises(LocalrunError):
        model.ask("Hello")
    with pytest.raises(LocalrunError):
        model.count_tokens("Hello")


def test_a_plan_is_the_command_s(capsys: pytest.CaptureFixture[str]) -> None:
    from localrun import cli

    arguments = ["plan", "flash", "--box", "gpu-24-ram-64", "--base", "q2_k", "--ram", "16GiB", "--json"]
    assert cli.main(arguments) == 0
    plan = localrun.plan("flash", machine="gpu-24-ram-64", base="q2_k", ram="16GiB")
    assert plan.to_json() == json.loads(capsys.readouterr().out)


def run(*arguments: str, cwd: Path | None = None, stdin: str = "") -> str:
    environment = {**os.environ, "LOCALRUN_THREADS": "1", "LOCALRUN_TEMPERATURE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], input=stdin, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [("ask", "language model"), ("stream", "language model"), ("agent", "\n"), ("plan_boxes", "gpu-24-ram-128")],
)
def test_example(name: str, says: str) -> None:
    assert says in run(str(ROOT / "examples" / f"{name}.py"), stdin="Who are you?\n")


def test_every_file_in_examples_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"ask", "stream", "agent", "plan_boxes"}


def test_examples_of_the_documentation_run_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "DeepSeek-V4-Flash").symlink_to(demo.checkpoint())
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.M | re.S))
    (tmp_path / "examples.py").write_text(code)
    said = run("examples.py", cwd=tmp_path)
    for part in ("language model", "weather", "base: 100%", "ram: "):
        assert part in said
