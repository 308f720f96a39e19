"""The binding: refuses what does not fit, loads no more than is needed, and never a second copy of ggml."""

from __future__ import annotations

import ctypes as C
import subprocess
import sys

import pytest

from localrun.errors import IncompatibleLibraryError
from localrun.ggml import library as binding
from localrun.ggml import structures
from localrun.ggml.library import Library, base, library


def run(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("first", ["base", "library"])
def test_one_copy_of_ggml_whichever_view_is_loaded_first(first: str) -> None:
    mapped = run(
        f"from localrun.ggml.library import base, library; {first}(); base(); library()\n"
        "print(*sorted({line.split()[-1] for line in open('/proc/self/maps') if 'libggml-base' in line}))"
    )
    assert len(mapped.split()) == 1


def test_number_formats_need_neither_libllama_nor_its_package() -> None:
    seen = run(
        "import sys, numpy as np\n"
        "from gguf import GGMLQuantizationType as T\n"
        "from localrun.quant.formats.quantize import dequantize_rows, quantize_rows\n"
        "rows = quantize_rows(np.ones((1, 256), np.float32), T.Q8_0)\n"
        "assert abs(dequantize_rows(rows, T.Q8_0) - 1).max() < 2**-11\n"
        "print('llama_cpp' in sys.modules, any('libllama' in line for line in open('/proc/self/maps')))"
    )
    assert seen == "False False"


def test_a_function_without_a_prototype_is_named() -> None:
    with pytest.raises(AttributeError, match="no prototype for ggml_flash"):
        _ = base().ggml_flash


def test_a_function_that_the_library_lacks_is_named() -> None:
    with pytest.raises(IncompatibleLibraryError, match="ggml_no_such_function is missing") as caught:
        Library(base().handle, {"ggml_no_such_function": (None,)})
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GGML_VERSION", "0.26.0", "ggml is 0.25.3, not 0.26.0"),
        ("BACKEND_API_VERSION", 3, "backend interface version 2, not 3"),
        ("LLAMA_CPP_PYTHON_VERSION", "0.4.0", "llama-cpp-python is 0.3.36, not 0.4.0"),
        ("OP_GLU", 99, r"operation 99 is .*, not b'GLU'"),
    ],
)
def test_another_pin_is_refused_before_anything_is_handed_out(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, message: str
) -> None:
    library()  # backends are loaded once per process
    monkeypatch.setattr(binding, name, value)
    with pytest.raises(IncompatibleLibraryError, match=message):
        library.__wrapped__()


def test_a_field_at_another_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved(C.Structure):
        _fields_ = [("padding_before", C.c_char * 8), *structures.Tensor._fields_[:-1]]

    library()
    assert C.sizeof(Moved) == C.sizeof(structures.Tensor), "or the size alone would tell"
    monkeypatch.setattr(binding, "Tensor", Moved)
    with pytest.raises(IncompatibleLibraryError, match="a fresh tensor reads"):
        library.__wrapped__()


def test_prototypes_of_llama_cpp_python_stay_its_own() -> None:
    seen = run(
        "import llama_cpp; handle = llama_cpp.llama_cpp._lib; before = dict(vars(handle))\n"
        "from localrun.ggml.library import library; library()\n"
        "print({name: f for name, f in vars(handle).items() if before.get(name) is not f})"
    )
    assert seen == "{}"
