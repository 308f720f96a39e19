"""Recipes: those that ship, and files with mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError, LocalrunError, UsageError
from localrun.quant.checkpoint.mapping import DENSE_TYPES
from localrun.quant.precision.recipes import installed_recipes, parse_recipe, read_recipe
from localrun.quant.precision.solver import HotBudget, Target, check_request
from tests.quant.precision.test_solver import layer


def test_shipped_recipes_are_sound() -> None:
    recipes = installed_recipes()
    assert len(recipes) >= 5
    for recipe in recipes.values():
        assert recipe.description
        assert (recipe.target is None) != (recipe.base is None)
        assert recipe.dense is None or recipe.dense in DENSE_TYPES
        if recipe.base is not None:
            check_request({0: layer(4)}, recipe.base, recipe.hot)
    assert read_recipe("gpu-24-ram-64").target == Target(20 << 30, 54 << 30)


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "q3_k"\nhot = ["mxfp4:1.5GiB", "q4_k:2GB"]\n')
    recipe = read_recipe(str(path))
    assert recipe.base == QT.Q3_K
    assert recipe.hot == (HotBudget(QT.MXFP4, 3 << 29), HotBudget(QT.Q4_K, 2 * 10**9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = q2_k", "not TOML"),
        ("", "sets no formats"),
        ('bass = "q2_k"', "unknown key 'bass'"),
        ('base = "q2"', "unknown expert format 'q2'"),
        ('base = "q2_k"\nhot = "mxfp4:1GiB"', "hot: expected a list"),
        ('base = "q2_k"\nhot = ["mxfp4:lots"]', "'lots' is not a size"),
        ("base = 2", "base: expected a string"),
        ('base = "q2_k"\ntarget = "1GiB-ram"', "target can't be combined with base or hot"),
        ('target = "1GiB"', "is not a target"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_recipe("mine", text.encode(), "mine.toml")


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe 'gpu-7'") as caught:
        read_recipe("gpu-7")
    assert "gpu-24-ram-64" in str(caught.value.hint)
    with pytest.raises(LocalrunError, match=r"missing\.toml: can't be read"):
        read_recipe(str(tmp_path / "missing.toml"))
