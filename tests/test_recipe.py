"""Presets, rules, and what is said about recipes that cannot be followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenmill
from tokenmill.errors import BadRecipe
from tokenmill.ir import cache, quant
from tokenmill.recipe import CACHE_FORMATS, ROLES, WEIGHT_FORMATS, Recipe, Rule

NAME = ["model.layers.1.mlp.experts.gate_up_proj"]


def _formats(recipe: Recipe) -> dict[str, str]:
    return {role: recipe.format_for(NAME, role) for role in ROLES}


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_is_for_experts_only(group: int) -> None:
    assert _formats(Recipe(weights=f"int4-g{group}")) == {
        "expert": f"int4-g{group}", "linear": "int8", "head": "int8", "embedding": "bf16",
        "latent_up": "int8", "router": "fp32", "norm": "fp32",
    }  # fmt: skip


def test_fp8_keeps_the_head_at_bf16() -> None:
    formats = _formats(Recipe(weights="fp8"))
    assert (formats["expert"], formats["linear"], formats["head"]) == ("fp8", "fp8", "bf16")


def test_the_default_is_bf16_with_router_and_norms_in_fp32() -> None:
    formats = _formats(Recipe())
    assert {role for role, fmt in formats.items() if fmt == "fp32"} == {"router", "norm"}
    assert set(formats.values()) == {"fp32", "bf16"}


def test_fp32_means_all_of_it() -> None:
    assert set(_formats(Recipe(weights="fp32")).values()) == {"fp32"}


def test_the_names_are_those_that_the_compiler_knows() -> None:
    assert set(WEIGHT_FORMATS) == {*quant.NAMES, "int4"}
    assert set(CACHE_FORMATS) == set(cache.FORMATS)


def test_the_first_rule_that_matches_wins() -> None:
    rules = [
        Rule(match="*.layers.1.*", format="bf16"),
        Rule(match="role:expert", format="int8"),
    ]
    recipe = Recipe(weights="int4", rules=rules)
    assert recipe.format_for(NAME, "expert") == "bf16"
    assert recipe.format_for(["model.layers.2.mlp.experts.down_proj"], "expert") == "int8"
    assert recipe.format_for(["model.layers.2.mlp.down_proj.weight"], "linear") == "int8"


def test_a_merged_weight_matches_by_any_of_its_names() -> None:
    recipe = Recipe(rules=[Rule(match="*.up_proj.weight", format="int8")])
    assert recipe.format_for(["a.gate_proj.weight", "a.up_proj.weight"], "linear") == "int8"


def test_int4_is_short_for_the_finest_groups() -> None:
    assert Recipe(weights="int4") == Recipe(weights="int4-g32")
    assert Recipe(weights="int4").dump()["weights"] == "int4-g32"


def test_a_dump_loads_again(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "weights: int4\nkv: int8\nrules:\n"
        "  - {match: 'model.layers.0.*', format: bf16}\ntargets: [cpu]\nmax_step_tokens: 64\n"
    )
    recipe = tokenmill.Recipe.load(file)
    assert recipe.kv == "int8"
    assert Recipe.model_validate(recipe.dump()).dump() == recipe.dump()


@pytest.mark.parametrize("role", ["router", "norm", "latent_up", "embedding"])
@pytest.mark.parametrize("format", ["fp8", "int4-g128"])
def test_what_loses_most_cannot_be_quantized(role: Any, format: str) -> None:
    with pytest.raises(BadRecipe, match=r"fp32, .*only|fp32 or bf16 only"):
        Recipe.model_validate({"rules": [{"match": f"role:{role}", "format": format}]})
    wide = Recipe(weights="int4", rules=[Rule(match="*", format="int4")])
    with pytest.raises(BadRecipe, match=f"rule with match: role:{role}"):
        wide.format_for(NAME, role)


def test_embeddings_may_be_int8() -> None:
    recipe = Recipe(weights="int4", rules=[Rule(match="role:embedding", format="int8")])
    assert recipe.format_for(["model.embed_tokens.weight"], "embedding") == "int8"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weights": "int3"}, "weights: unknown value 'int3'.*int4-g128"),
        ({"kv": "int4"}, "kv: unknown value 'int4'.*fp32, bf16, int8, fp8$"),
        ({"wieghts": "int4"}, "wieghts: unknown field.*known fields: weights, kv"),
        ({"rules": [{"match": "*", "format": "q4"}]}, r"rules\[0\].format: unknown value 'q4'"),
        ({"rules": [{"match": "*"}]}, r"rules\[0\].format: missing"),
        ({"rules": [{"match": "role:exprt", "format": "int8"}]}, "unknown role 'exprt'.*expert"),
        ({"rules": "int8"}, "rules: .*known fields: match, format$"),
        ({"targets": []}, "targets: "),
        ({"targets": "cpu"}, r'targets: .*default of targets is \["cpu"\]$'),
        ({"kv_compress": {"rnak": 3}}, "kv_compress.rnak: unknown field.*known fields: save, rank"),
        ({"heal_scales": {"hours": 1}}, "hours: unknown field.*known fields: minutes, steps$"),
        ({"heal_scales": True}, "heal_scales: .*found True"),
        ({"max_step_tokens": 0}, "max_step_tokens: .*found 0"),
        ({"max_step_tokens": True}, "max_step_tokens: "),
        ({"max_step_rows": 1.5}, "max_step_rows: "),
    ],
)
def test_a_bad_field_is_named_with_its_remedy(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadRecipe, match=f"(?s){expected}"):
        Recipe.model_validate(fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "is empty"),
        (b"- int4\n", "holds a list"),
        (b"weights: [int4", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"weights: int5\n", "weights: unknown value 'int5'"),
        (b"!!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: bytes, expected: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(text)
    with pytest.raises(BadRecipe, match=f"bad.yaml.*{expected}"):
        Recipe.load(file)


def test_a_missing_file_or_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(BadRecipe, match="cannot be read"):
            Recipe.load(path)
