"""What machine code depends on: every kind of thing that can change it does change the number, and nothing else does."""

from __future__ import annotations

import dis
import inspect
import os
import subprocess
import sys
from types import FunctionType, ModuleType

import pytest

from localrun.fingerprint import _steps_of, fingerprint
from localrun.offload.kernels.cpu import Level
from localrun.offload.kernels.interleaved.formats import FORMATS
from localrun.offload.kernels.interleaved.rows import rows_function
from localrun.offload.kernels.reading import Reading
from localrun.offload.kernels.records import Layout

NO_STEPS = ("PRECALL", "CACHE", "PUSH_NULL")
"""Operations that stand between a global and its attribute in some versions of Python only."""

SOURCE = '''
"""The module."""
from __future__ import annotations
from dataclasses import dataclass
from enum import Enum
import numpy as np
import numba as nb
from numba import types
from numba.extending import intrinsic

STEP = 3
TABLE = np.array([1, 2, 3], np.int8)
UNUSED = 1

class Colour(Enum):
    RED = 1

@dataclass
class Format:
    """A format."""
    width: int

    def bytes(self) -> int:
        """Bytes."""
        return self.width * 8

FORMATS = {Colour.RED: Format(4)}

@intrinsic
def _generated(_typing, x):
    """Generated."""
    def codegen(context, builder, signature, args):
        """The code."""
        return context.get_constant(types.int64, FORMATS[Colour.RED].bytes())
    return types.int64(types.int64), codegen

@nb.njit
def helper(x):
    """Helps."""
    return x + STEP

def make(scale):
    @nb.njit(fastmath={"reassoc", "contract", "nsz"})
    def kernel(x):
        """Computes."""
        total = 0
        for value in [1, 2]:
            total += TABLE[value] * scale
        return helper(x) + _generated(x) + total
    return kernel

kernel = make(5)
'''


def number(old: str = "", new: str = "") -> str:
    """The fingerprint of `kernel` when one text of the module is another."""
    assert old in SOURCE
    module = ModuleType("localrun.made_up")
    exec(compile(SOURCE.replace(old, new, 1), "made_up.py", "exec"), vars(module))
    return fingerprint(module.kernel)


@pytest.fixture(autouse=True)
def _module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "localrun.made_up", ModuleType("localrun.made_up"))  # for dataclasses


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""The module."""', '"""Another\n\nmodule."""'),
        ('"""Computes."""', '"""Computes\n\n        this and that."""'),
        ('"""Helps."""', '"""Helps a lot."""'),
        ('"""Generated."""', '"""Generates."""'),
        ('"""The code."""', '"""LLVM."""'),
        ('"""A format."""', '"""Some format."""'),
        ('"""Bytes."""', '"""Size."""'),
        ("UNUSED = 1", "UNUSED = 2"),
        ("STEP = 3", "# a comment\n\nSTEP = 3  # another"),
    ],
)
def test_words_positions_and_what_is_not_used_do_not_count(old: str, new: str) -> None:
    assert number(old, new) == number()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("total = 0", "total = 1", id="the function's own code"),
        pytest.param("[1, 2]", "[1, 1]", id="a constant"),
        pytest.param("STEP = 3", "STEP = 4", id="a global of a callee"),
        pytest.param("STEP = 3", "STEP = 3.0", id="its type"),
        pytest.param("return x + STEP", "return x - STEP", id="a callee's code"),
        pytest.param("1, 2, 3]", "1, 2, 4]", id="a table's content"),
        pytest.param("np.int8", "np.int16", id="a table's type"),
        pytest.param("make(5)", "make(6)", id="a closure"),
        pytest.param('"nsz"', '"ninf"', id="an option of the compiler"),
        pytest.param("@nb.njit\n", "@nb.njit(inline='always')\n", id="a callee's option"),
        pytest.param("types.int64, FORMATS", "types.int32, FORMATS", id="the code generator's code"),
        pytest.param("Format(4)", "Format(5)", id="an object that the code generator uses"),
        pytest.param("self.width * 8", "self.width * 9", id="a method that the code generator calls"),
        pytest.param("RED = 1", "RED = 2", id="a member of an enumeration"),
    ],
)
def test_what_goes_into_the_code_counts(old: str, new: str) -> None:
    assert number(old, new) != number()


@pytest.mark.parametrize("kernel", ["by_name", "by_closure", "by_table"])
def test_a_record_s_layout_counts_however_code_gets_at_it(kernel: str) -> None:
    source = """
class Fields(Layout):
    first: int
    second: int

FIELDS = Fields()
TABLE = (FIELDS,)

def by_name(record):
    return record + FIELDS.second

def make(fields):
    return lambda record: record + fields.second

by_closure = make(FIELDS)

def by_table(record):
    return record + TABLE[0].second
"""
    numbers = []
    for text in (source, source.replace("    first: int\n", "")):
        module = ModuleType("localrun.made_up")
        vars(module)["Layout"] = Layout
        sys.modules["localrun.made_up"] = (
            module  # where the layout's hints are looked up; the fixture takes it out again
        )
        exec(text, vars(module))
        numbers.append(fingerprint(getattr(module, kernel)))
    assert numbers[0] != numbers[1]


def test_levels_and_formats_of_kernels_are_different_code() -> None:
    """Not compiled here: levels that this processor lacks could not run."""
    levels = (Level.AVX2, Level.AVX_VNNI, Level.AVX512)
    kernels = [rows_function(type_, level, Reading.IN_ORDER) for level in levels for type_ in list(FORMATS)[:3]]
    assert len({fingerprint(kernel) for kernel in kernels}) == 9


def test_an_environment_variable_that_generated_code_asks_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("localrun.made_up")
    source = "import os\ndef made(): return os.environ.get('LOCALRUN_KERNELS')"
    numbers = []
    for value in ("avx2", "generic"):
        monkeypatch.setenv("LOCALRUN_KERNELS", value)
        exec(source, vars(module))
        numbers.append(fingerprint(module.made))
    assert numbers[0] != numbers[1]


def test_instructions_are_read_as_dis_reads_them() -> None:
    """Also those with more names than one byte can number."""
    many = compile("\n".join(f"import module{n}\nmodule{n}.part{n}" for n in range(600)), "many.py", "exec")
    functions = [value for value in vars(inspect).values() if isinstance(value, FunctionType)]
    names = set()
    for code in (many, *(function.__code__ for function in functions)):
        steps = _steps_of(code)
        expected = [step for step in dis.get_instructions(code) if step.opname not in ("EXTENDED_ARG", *NO_STEPS)]
        assert [operation for operation, _ in steps] == [step.opcode for step in expected]
        assert all(name in ("", step.argval) for (_, name), step in zip(steps, expected, strict=True))
        names |= {name for _, name in steps}
    assert names >= {"module599", "part599", "isinstance", "__code__"}


def test_it_is_the_same_in_every_process() -> None:
    code = (
        "from localrun.fingerprint import fingerprint; from localrun.offload.device.compiled import graph_compute\n"
        "from localrun.quant.formats import kernels; print(fingerprint(graph_compute), fingerprint(kernels.f32_to_bf16))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
