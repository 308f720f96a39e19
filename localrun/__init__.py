"""localrun: DeepSeek-V4-Flash and V4-Pro on one workstation, offline.

    import localrun

    with localrun.load("demo") as model:
        print(model.ask("Hello! Who are you?"))

`__all__` is the stable API (docs/api.md). Importing costs nothing: each name is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localrun.api.answer import Answer
    from localrun.api.conversion import convert
    from localrun.api.model import Model, load
    from localrun.api.planning import Machine, plan
    from localrun.engine.planner.plan import Plan
    from localrun.engine.process.protocol import Delta, Finished, PromptProgress, ToolCall
    from localrun.errors import LocalrunError

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Delta",
    "Finished",
    "LocalrunError",
    "Machine",
    "Model",
    "Plan",
    "PromptProgress",
    "ToolCall",
    "convert",
    "load",
    "plan",
]

_MODULES = {
    "Answer": "localrun.api.answer",
    "Delta": "localrun.engine.process.protocol",
    "Finished": "localrun.engine.process.protocol",
    "LocalrunError": "localrun.errors",
    "Machine": "localrun.api.planning",
    "Model": "localrun.api.model",
    "Plan": "localrun.engine.planner.plan",
    "PromptProgress": "localrun.engine.process.protocol",
    "ToolCall": "localrun.engine.process.protocol",
    "convert": "localrun.api.conversion",
    "load": "localrun.api.model",
    "plan": "localrun.api.planning",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'localrun' has no attribute '{name}'")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
