"""Emission for GPUs: golden text, purity, one binary for what is the same."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenmill import codegen
from tokenmill.codegen.triton.emit import EMITTERS, SUPPORT, buckets
from tokenmill.codegen.triton.expr import triton_code
from tokenmill.codegen.triton.target import TARGETS
from tokenmill.errors import BadRecipe
from tokenmill.ir.plan import KINDS, Capacity, Plan
from tokenmill.passes.narrow import narrow

from ..decoder import decoder_plan

GOLDEN = Path(__file__).parents[2] / "golden" / "triton"


def gpu_plan() -> Plan:
    return narrow(replace(decoder_plan(), device="cuda"))


@pytest.fixture(scope="module")
def sources() -> Mapping[str, str]:
    return codegen.emit(gpu_plan(), "sm_90")


@pytest.fixture(scope="module")
def schedule(sources: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(sources["schedule.json"])


def test_emitted_text_is_golden(sources: Mapping[str, str], update_golden: bool) -> None:
    copied = {f"{name}.py" for name in SUPPORT}
    emitted = {name: text for name, text in sources.items() if name.endswith(".py")}
    emitted = {name: text for name, text in emitted.items() if name not in copied}
    if update_golden:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for old in GOLDEN.iterdir():
            old.unlink()
        for name, text in emitted.items():
            (GOLDEN / f"{name}.txt").write_text(text)
    assert emitted == {p.name.removesuffix(".txt"): p.read_text() for p in GOLDEN.iterdir()}


def test_every_kernel_kind_has_an_emitter() -> None:
    assert EMITTERS.keys() == KINDS.keys() - {"extern"}


@pytest.mark.parametrize("target", TARGETS)
def test_emission_is_pure(target: str) -> None:
    assert codegen.emit(gpu_plan(), target) == codegen.emit(gpu_plan(), target)


def test_text_is_tidy(sources: Mapping[str, str]) -> None:
    for name, text in sources.items():
        assert text.endswith("\n"), name
        assert not re.search(r"[ \t]$|\t|\$", text, re.MULTILINE), name
        if name.endswith(".py"):
            compile(text, name, "exec")


def test_the_schedule_names_what_the_text_defines(
    sources: Mapping[str, str], schedule: dict[str, Any]
) -> None:
    for binary in schedule["binaries"]:
        assert f"def {binary['function']}(" in sources[binary["file"]]
    names = {binary["name"] for binary in schedule["binaries"]}
    assert names == {launch["binary"] for group in schedule["groups"] for launch in group}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_begins_by_waiting(target: str) -> None:
    sources = codegen.emit(gpu_plan(), target)
    for binary in json.loads(sources["schedule.json"])["binaries"]:
        (function,) = (
            node
            for node in ast.parse(sources[binary["file"]]).body
            if isinstance(node, ast.FunctionDef) and node.name == binary["function"]
        )
        assert ast.get_docstring(function), function.name
        assert ast.unparse(function.body[1]) == "wait_for_launches()", function.name
    waits = "gdc_wait()" in sources["launches.py"]
    assert waits == TARGETS[target].dependent_launch


def test_steps_of_the_same_kind_share(schedule: dict[str, Any]) -> None:
    binaries = [
        json.dumps({k: v for k, v in b.items() if k != "name"}, sort_keys=True)
        for b in schedule["binaries"]
    ]
    assert len(binaries) == len(set(binaries))
    groups = [json.dumps(group, sort_keys=True) for group in schedule["groups"]]
    assert len(groups) == len(set(groups))


@given(st.integers(1, 5000), st.integers(1, 300))
def test_buckets_hold_every_batch(tokens: int, rows: int) -> None:
    found = buckets(Capacity(tokens, rows))
    sizes = [b.tokens for b in found]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == tokens
    assert found[-1].rows == found[-1].sequences == min(tokens, rows)


def test_expressions_keep_their_order() -> None:
    assert triton_code("x0 - (x1 - x2)") == "x0 - (x1 - x2)"
    assert triton_code("-x0 * 2.0 / (1.0 + exp(-x1))") == "(-x0) * 2.0 / (1.0 + tl.exp((-x1)))"


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(BadRecipe, match="sm_42"):
        codegen.parse_target("sm_42")
