"""Types that the gguf package does not know are in its tables as if it did."""

from __future__ import annotations

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.ggml import extra_types


def test_a_type_that_gguf_lacks_is_found_by_number_name_and_size() -> None:
    kind = GGMLQuantizationType(42)
    assert (kind.name, kind.value, int(kind)) == ("Q2_0", 42, 42)
    assert GGMLQuantizationType["Q2_0"] is kind
    assert kind in list(GGMLQuantizationType)
    assert GGML_QUANT_SIZES[kind] == (64, 18)  # an F16 and 64 x 2 bits


def test_types_that_gguf_has_stay_as_they_are() -> None:
    n_types, sizes = len(GGMLQuantizationType), dict(GGML_QUANT_SIZES)
    extra_types._add(8, "Q8_0", 1, 1)
    assert len(GGMLQuantizationType) == n_types
    assert sizes == GGML_QUANT_SIZES
