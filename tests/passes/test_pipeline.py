"""The runner: order, legality, translation validation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenmill.capture.module import capture
from tokenmill.errors import BadRecipe, IllegalProgram, WrongRewrite
from tokenmill.ir.program import Program, Stage
from tokenmill.passes.base import Pass, calls, mill
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import fx

from ..models import hand_written

EXACT = Recipe(weights="fp32", kv="fp32")


@pytest.fixture
def program() -> Program:
    return capture(hand_written(), max_positions=256)


class Planted(Pass):
    """A rewrite that is wrong in the way that ``edit`` says."""

    name = "planted"

    def __init__(self, edit: Callable[[Program], object]) -> None:
        self.edit = edit

    def run(self, program: Program) -> int:
        self.edit(program)
        return 1


def fused(program: Program) -> Program:
    run_passes(program, pipeline(EXACT))
    return program


def swap_epsilon(program: Program) -> None:
    node = list(calls(program, mill.rms_norm))[1]
    node.args = (*node.args[:2], 0.5)


def drop_rotation(program: Program) -> None:
    node = next(calls(program, mill.rope))
    node.replace_all_uses_with(node.args[0])


def swap_rows(program: Program) -> None:
    node = next(n for n in program.graph.nodes if n.op == "get_attr" and "down" in n.target)
    program.weights.derive("planted", lambda w: w.flip(0), node.target)
    node.target = "planted"


@pytest.mark.parametrize("edit", [swap_epsilon, drop_rotation, swap_rows])
def test_a_wrong_rewrite_is_caught_and_named(
    program: Program, edit: Callable[[Program], object]
) -> None:
    with pytest.raises(WrongRewrite, match="planted") as caught:
        run_passes(fused(program), [Planted(edit)], check=True)
    assert "blocks." in str(caught.value), "the error names the place in the user's model"


def test_without_check_nothing_is_executed(program: Program) -> None:
    (result,) = run_passes(fused(program), [Planted(swap_epsilon)])
    assert result.error is None


def use_before_definition(program: Program) -> None:
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    first.prepend(list(calls(program, mill.linear))[-1])


def leave_dequantize(program: Program) -> None:
    weight = next(n for n in program.graph.nodes if n.op == "get_attr" and n.users)
    with program.graph.inserting_before(weight.next):
        program.call(mill.dequantize.default, [weight], "fp32", 1)


def unknown_weight(program: Program) -> None:
    next(n for n in program.graph.nodes if n.op == "get_attr").target = "nowhere"


def misshapen_weight(program: Program) -> None:
    node = next(n for n in program.graph.nodes if n.op == "get_attr")
    program.weights.derive("bent", lambda w: torch.cat((w, w)), node.target)
    node.target = "bent"


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (use_before_definition, "before it is computed"),
        (leave_dequantize, "not legal at FUSED"),
        (unknown_weight, "no weight 'nowhere'"),
        (misshapen_weight, "the node says otherwise"),
    ],
)
def test_malformed_programs_are_refused(
    program: Program, edit: Callable[[Program], object], complaint: str
) -> None:
    with pytest.raises(IllegalProgram, match=complaint):
        run_passes(fused(program), [Planted(edit)])


def test_stages_advance(program: Program) -> None:
    seen: list[Stage] = []
    run_passes(program, pipeline(EXACT), observe=lambda p, r: seen.append(p.stage))
    assert seen == sorted(seen)
    assert seen[-1] is Stage.FUSED


def test_a_pass_can_be_disabled_by_name() -> None:
    names = [p.name for p in pipeline(Recipe(disable=["compress_kv"]))]
    assert "compress_kv" not in names
    with pytest.raises(BadRecipe, match="no pass 'nonsense'"):
        pipeline(Recipe(disable=["nonsense"]))
    with pytest.raises(BadRecipe, match="after 'insert_cache' needs it"):
        pipeline(Recipe(disable=["fuse_norm", "insert_cache"]))


def test_every_pass_says_what_it_does() -> None:
    for one in pipeline(Recipe()):
        assert len(one.summary) > 10, one.name


def test_a_copy_is_rewritten_alone(program: Program) -> None:
    twin = program.copy()
    fused(twin)
    assert program.stage is Stage.ATEN
    assert not any(
        isinstance(n, fx.Node) and n.target is mill.linear.default for n in program.graph.nodes
    )
