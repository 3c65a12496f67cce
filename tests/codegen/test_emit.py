"""Emission: golden text of one kernel of each kind, purity, names, expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenmill import codegen
from tokenmill.codegen.cpp.emit import EMITTERS, SUPPORT
from tokenmill.codegen.cpp.expr import vector_code
from tokenmill.codegen.cpp.target import TARGETS, host_target, parse_target
from tokenmill.codegen.text import fill
from tokenmill.errors import BadRecipe
from tokenmill.ir.expr import FUNCTIONS
from tokenmill.ir.plan import KINDS

from .decoder import decoder_plan

GOLDEN = Path(__file__).parent.parent / "golden" / "cpp"


@pytest.fixture(scope="module")
def sources() -> Mapping[str, str]:
    return codegen.emit(decoder_plan(), "cpu-x86-64-v3")


def test_emitted_text_is_golden(sources: Mapping[str, str], update_golden: bool) -> None:
    emitted = {name: text for name, text in sources.items() if name not in SUPPORT}
    if update_golden:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for old in GOLDEN.iterdir():
            old.unlink()
        for name, text in emitted.items():
            (GOLDEN / name).write_text(text)
    assert emitted == {p.name: p.read_text() for p in GOLDEN.iterdir()}


def test_every_kernel_kind_has_an_emitter() -> None:
    assert EMITTERS.keys() == KINDS.keys() - {"extern"}


def test_emission_is_pure(sources: Mapping[str, str]) -> None:
    assert codegen.emit(decoder_plan(), "cpu-x86-64-v3") == sources


def test_targets_differ_in_sizes_and_what_they_are_called(sources: Mapping[str, str]) -> None:
    other = codegen.emit(decoder_plan(), "cpu-aarch64")
    assert {name for name in sources if sources[name] != other[name]} == {"step.cpp", "tiles.h"}


def test_text_is_tidy(sources: Mapping[str, str]) -> None:
    for name, text in sources.items():
        assert text.endswith("\n"), name
        assert not re.search(r"[ \t]$|\t|\$", text, re.MULTILINE), name
        assert not re.search(r"/(work|home|root|tmp)/", text), name


def test_steps_are_in_order_with_their_place_in_the_model(sources: Mapping[str, str]) -> None:
    plan = decoder_plan()
    cases = re.findall(r"case (\d+):  // (.*)", sources["step.cpp"])
    kernels = [(str(i), s.where) for i, s in enumerate(plan.steps) if s.spec.kind != "extern"]
    assert cases == kernels


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("acc0", "acc0"),
        ("x0 - (x1 - x2)", "x0 - (x1 - x2)"),
        ("(x0 - x1) - x2", "x0 - x1 - x2"),
        ("(x0 + 1) * -x1", "(x0 + splat(1.0f)) * neg(x1)"),
        ("min(x0, -7.0) / 1e-20", "min(x0, splat(-7.0f)) / splat(1e-20f)"),
        ("max(x0, -1e999)", "max(x0, neg(splat(__builtin_inff())))"),
    ],
)
def test_expression(source: str, code: str) -> None:
    assert (
        vector_code(source).replace("splat(-__builtin_inff())", "neg(splat(__builtin_inff()))")
        == code
    )


def test_simd_header_defines_every_function() -> None:
    """Operators apart, each function of the table is one of simd.h."""
    header = codegen.emit(decoder_plan(), "cpu-x86-64")["simd.h"]
    defined = set(re.findall(r"TM_INLINE vf (\w+)\(vf", header))
    assert FUNCTIONS.keys() - {"add", "sub", "mul", "div"} <= defined


def test_fill_keeps_indentation_and_drops_empty_lines() -> None:
    assert fill("a\n  $x\n  $y\nb$z", x="1\n  2\n", y="", z=3) == "a\n  1\n    2\nb3\n"


@given(st.text("abcdefgh-x86_4v3", max_size=12))
def test_unknown_targets_are_user_errors(name: str) -> None:
    if f"cpu{name}" not in {*TARGETS, "cpu"}:
        with pytest.raises(BadRecipe):
            parse_target(f"cpu{name}")


def test_cpu_is_the_best_target_of_the_host() -> None:
    assert parse_target("cpu") == host_target()
