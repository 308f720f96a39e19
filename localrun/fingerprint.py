"""A hash of everything that can influence the machine code of a function compiled by numba.

That is the function's bytecode, the values of its globals, closure and defaults, and, recursively, those of every function and
class of the package that it references: callees, intrinsics with the Python that generates their code, tables, constants, byte
offsets into C structures. Names, docstrings, comments, line numbers and annotations are excluded, as are globals that the code
does not mention, so changing a docstring or an unrelated module does not change the hash.

Anything outside the package (numba, numpy, the standard library) is identified by name; callers add versions. If a function
reads `os.environ`, the `LOCALRUN_*` variables that it names are included, because they may select code.

Objects are hashed as they are when first visited, so tables filled by importing other modules must be complete by then.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import inspect
import itertools
import os
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic

_PACKAGE: Final = __name__.partition(".")[0]
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range)
_BY_TEXT = (numba.types.Type, ir.Type, ir.Constant, np.dtype)
"""Instances of other packages that are their own description."""

_NO_MEMBERS = frozenset(
    {
        *("__module__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__qualname__", "__slots__"),
        *("__dataclass_fields__", "__dataclass_params__", "__match_args__", "__firstlineno__", "__static_attributes__"),
        *("__abstractmethods__", "_abc_impl", "_is_protocol", "__parameters__", "__orig_bases__", "__replace__"),
    }
)
"""Of a class: what its code does not depend on, or what stands in other members too."""


_HAS_DOCSTRING: Final = 0x4000000
"""CO_HAS_DOCSTRING of Python 3.13 and later."""

_IMPORT_NAME: Final = dis.opmap["IMPORT_NAME"]
_LOADS_GLOBAL: Final = {dis.opmap["LOAD_GLOBAL"], dis.opmap["LOAD_NAME"]}
_TAKES_ATTRIBUTE: Final = {dis.opmap[name] for name in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM") if name in dis.opmap}
_NO_STEP: Final = {dis.opmap[name] for name in ("PRECALL", "CACHE", "PUSH_NULL") if name in dis.opmap}
_NAME_SHIFT: Final = dict.fromkeys({_IMPORT_NAME, *_LOADS_GLOBAL, *_TAKES_ATTRIBUTE}, 0) | {
    dis.opmap["LOAD_GLOBAL"]: 1,
    dis.opmap["LOAD_ATTR"]: 1 if sys.version_info >= (3, 12) else 0,
}
"""Operation -> bits of its argument below the name's index: they say what else it does (CPython's `Python/bytecodes.c`)."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ref:
    """Something that has parts of its own."""

    value: Any


_Part = bytes | _Ref
_parts: dict[int, tuple[Any, list[_Part]]] = {}
"""By id: the object, kept so that the id stays its own, and its parts."""


def fingerprint(function: Any) -> str:
    """64 hex digits that change when the machine code of `function` (plain, or a dispatcher of numba's) may."""
    state, order = hashlib.sha256(), [function]
    numbers = {id(function): 0}
    for value in order:  # grows
        for part in _parts_of(value):
            if isinstance(part, bytes):
                state.update(b"%d:" % len(part) + part)
                continue
            if id(part.value) not in numbers:
                numbers[id(part.value)] = len(order)
                order.append(part.value)
            state.update(b"@%d" % numbers[id(part.value)])
        state.update(b";")
    return state.hexdigest()


def _parts_of(value: Any) -> list[_Part]:
    known = _parts.get(id(value))
    if known is None:
        known = _parts[id(value)] = (value, list(_describe(value)))
    return known[1]


def _text(*words: object) -> bytes:
    return " ".join(map(str, words)).encode()


def _is_ours(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    return name.partition(".")[0] in (_PACKAGE, "tools", "tests", "__main__")


def _describe(value: Any) -> Iterator[_Part]:
    """An object's kind and parts."""
    if isinstance(value, enum.Enum):
        yield from (_text("member", type(value).__qualname__, value.name), _Ref(value.value))
    elif isinstance(value, _PLAIN):
        yield _text(type(value).__name__, repr(value))
    elif isinstance(value, np.ndarray | np.generic):
        yield from (_text(type(value).__name__, value.dtype, value.shape), value.tobytes())
    elif isinstance(value, tuple | list):
        yield _text(type(value).__name__, len(value))
        yield from map(_Ref, value)
    elif isinstance(value, set | frozenset):
        yield from (_text("set", len(value)), *sorted(fingerprint(item).encode() for item in value))
    elif isinstance(value, dict | types.MappingProxyType):
        yield _text("dict", len(value))
        yield from (_Ref(item) for pair in value.items() for item in pair)
    elif isinstance(value, types.CodeType):
        yield from _describe_code(value)
    elif isinstance(value, _BY_TEXT):
        yield _text(type(value).__qualname__, value)
    elif isinstance(value, types.ModuleType):
        yield _text("module", value.__name__)
        if _is_ours(value) and sys.modules.get(value.__name__) is not value:  # an object that numba takes as one
            yield _Ref({name: item for name, item in vars(value).items() if not name.startswith("_")})
    elif isinstance(value, type):
        yield from _describe_class(value)
    else:
        yield from _describe_callable(value)


def _describe_callable(value: Any) -> Iterator[_Part]:
    if isinstance(value, Dispatcher):
        yield from (_text("jit"), _Ref(value.targetoptions), _Ref(value.py_func))
    elif isinstance(value, CFunc):
        compiler: Any = value._compiler  # type: ignore[attr-defined]
        yield from (_text("cfunc"), _Ref(compiler.targetoptions), _Ref(value.__wrapped__))
    elif isinstance(value, _Intrinsic):
        yield from (_text("intrinsic"), _Ref(value._defn))
    elif isinstance(value, functools.partial):
        yield from (_text("partial"), _Ref(value.func), _Ref(value.args), _Ref(value.keywords))
    elif isinstance(value, staticmethod | classmethod):
        yield from (_text(type(value).__name__), _Ref(value.__func__))
    elif isinstance(value, property):
        yield from (_text("property"), _Ref(value.fget))
    elif isinstance(value, types.MethodType):
        yield from (_text("method"), _Ref(value.__func__), _Ref(value.__self__))
    elif hasattr(value, "__wrapped__") and _is_ours(value):  # functools.cache and the like
        yield from (_text("wrapped"), _Ref(value.__wrapped__))
    elif isinstance(value, types.FunctionType) and _is_ours(value):
        yield from _describe_function(value)
    elif callable(value) and hasattr(value, "__qualname__"):
        yield _text(getattr(value, "__module__", None), value.__qualname__)
    elif _is_ours(type(value)):
        yield from (_text("instance"), _Ref(type(value)), _Ref(_state_of(value)))
    else:
        yield _text("a", type(value).__module__, type(value).__qualname__)


def _describe_class(value: type) -> Iterator[_Part]:
    yield _text("class", value.__module__ if not _is_ours(value) else "", value.__qualname__)
    if not _is_ours(value) or issubclass(value, BaseException):
        return
    yield from map(_Ref, value.__bases__)
    for name, member in vars(value).items():
        if name not in _NO_MEMBERS and not isinstance(member, types.MemberDescriptorType | types.GetSetDescriptorType):
            yield from (_text(name), _Ref(member))


def _state_of(value: Any) -> dict[str, Any]:
    slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _describe_function(function: types.FunctionType) -> Iterator[_Part]:
    yield from (_text("function"), _Ref(function.__code__), _Ref(function.__defaults__), _Ref(function.__kwdefaults__))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield from (_text("cell", name), _Ref(cell.cell_contents))
        except ValueError:
            yield _text("cell", name, "empty")
    for code in _nested(function.__code__):
        for name, used in _globals_of(code, function.__globals__):
            yield from (_text("global", name), _Ref(used))
        if "environ" in code.co_names:
            named = [text for text in code.co_consts if isinstance(text, str) and text.startswith("LOCALRUN_")]
            yield from (_text("environment", name, os.environ.get(name)) for name in named)


def _describe_code(code: types.CodeType) -> Iterator[_Part]:
    """Bytecode without positions and docstring."""
    flags = code.co_flags & ~_HAS_DOCSTRING
    yield _text("code", code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, flags)
    yield from (code.co_code, _text(code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
    yield code.co_exceptiontable
    yield _text("constants", len(code.co_consts))
    yield from map(_Ref, code.co_consts[1 if _docstring_first(code) else 0 :])


def _docstring_first(code: types.CodeType) -> bool:
    """Whether the first constant is a function's docstring; where a function has none, it is None before Python 3.13."""
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & _HAS_DOCSTRING)
    is_function = code.co_flags & inspect.CO_NEWLOCALS and not code.co_name.startswith("<")
    return bool(is_function and code.co_consts and isinstance(code.co_consts[0], str))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _globals_of(code: types.CodeType, scope: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Globals that the code mentions; for one of our modules only the attribute used, not the whole module."""
    steps = _steps_of(code)
    for at, (operation, name) in enumerate(steps):
        if operation in _LOADS_GLOBAL and name in scope:
            value = scope[name]
        elif operation == _IMPORT_NAME and name in sys.modules:
            value = sys.modules[name]
        else:
            continue
        for after, attribute in itertools.islice(steps, at + 1, None):
            if after not in _TAKES_ATTRIBUTE or not isinstance(value, types.ModuleType) or not _is_ours(value):
                break
            name, value = f"{name}.{attribute}", getattr(value, attribute)
        yield name, value


def _steps_of(code: types.CodeType) -> list[tuple[int, str]]:
    """Each instruction's operation and the name that it takes, "" if it takes none. `dis` says the same, but also what nobody
    asks for here."""
    steps: list[tuple[int, str]] = []
    names, high = code.co_names, 0
    for operation, argument in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        if operation in _NO_STEP:
            continue
        argument |= high
        high = argument << 8 if operation == dis.EXTENDED_ARG else 0
        if operation != dis.EXTENDED_ARG:
            shift = _NAME_SHIFT.get(operation)
            steps.append((operation, "" if shift is None else names[argument >> shift]))
    return steps
