from __future__ import annotations

import subprocess
import sys

from localrun.quant.formats import grid_quantize, k_quantize, kernels, later


def test_what_is_asked_for_is_the_module_s_own() -> None:
    assert later.kernels.fp4_to_mxfp4 is kernels.fp4_to_mxfp4
    assert later.k_quantize.quantize is k_quantize.quantize
    assert later.grid_quantize.quantize is grid_quantize.quantize


def test_models_are_opened_and_found_without_the_compiler() -> None:
    code = "import sys, localrun.quant.open, localrun.quant.locate; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
