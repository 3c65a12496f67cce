"""Gradients through a program are those of the model that it was captured from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenmill.capture.huggingface import capture_pretrained
from tokenmill.capture.module import capture
from tokenmill.ir import ops
from tokenmill.ir.program import Program
from tokenmill.passes.differentiate import Differentiable, causal
from tokenmill.passes.insert_cache import InsertCache
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor, nn

from ..models import hand_written, pretrained

LENGTHS = (70, 1, 9)


def dialect(program: Program) -> Program:
    """A captured program, as it is before cache insertion."""
    passes = pipeline(Recipe())
    names = [one.name for one in passes]
    run_passes(program, passes[: names.index(InsertCache.name)])
    return program


def _captured(name: str) -> tuple[nn.Module, Program]:
    if name == "hand_written":
        model: Any = hand_written()
        return model, dialect(capture(copy.deepcopy(model), max_positions=256, name=name))
    model = pretrained(name)
    return model, dialect(capture_pretrained(copy.deepcopy(model), name))


def _sequences(vocab: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (n,), generator=rng) for n in lengths]


class _Computed(dict[str, Tensor]):
    """Weights by name, those that are derived computed where autograd sees it."""

    def __init__(self, program: Program, given: dict[str, Tensor]) -> None:
        super().__init__(given)
        self.program = program

    def __missing__(self, name: str) -> Tensor:
        derived = self.program.weights._derived[name]
        self[name] = derived.function(*(self[s] for s in derived.sources))
        return self[name]


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "hand_written"])
def test_gradients_are_those_of_the_model(name: str) -> None:
    model, program = _captured(name)
    text = _sequences(program.vocab)
    targets = torch.cat(_sequences(program.vocab, LENGTHS[::-1]))
    eager = torch.cat([getattr(out := model(ids[None]), "logits", out)[0] for ids in text])
    F.cross_entropy(eager, targets).backward()

    given = {
        n: program.weights[n]
        .detach()
        .clone()
        .requires_grad_(program.weights[n].is_floating_point())
        for n in program.weights
        if not program.weights.sources(n)
    }
    logits = Differentiable(program, _Computed(program, given)).logits(text)
    torch.testing.assert_close(logits, eager, rtol=1e-3, atol=1e-4)
    F.cross_entropy(logits, targets).backward()

    compared = 0
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found = given.get(parameter_name)
        if found is None:
            continue
        compared += 1
        error = (found.grad - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-9)
        assert error < 1e-3, f"{parameter_name}: {error:.2g}"
    assert compared >= len(list(model.parameters())) - 1


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 127, 128, 129, 300]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    widths=st.sampled_from([(4, 4), (6, 3), (3, 6)]),
    window=st.sampled_from([0, 1, 5, 128, 200, 1000]),
    softcap=st.sampled_from([0.0, 2.0]),
    sinks=st.booleans(),
)
def test_attention_in_blocks_is_the_op(
    tokens: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    window: int,
    softcap: float,
    sinks: bool,
) -> None:
    rng = torch.Generator().manual_seed(tokens)
    shapes = [
        (tokens, heads[0], widths[0]),
        (tokens, heads[1], widths[0]),
        (tokens, heads[1], widths[1]),
    ]
    qkv = [torch.randn(s, generator=rng, requires_grad=True) for s in shapes]
    inputs = [*qkv, *([torch.randn(heads[0], generator=rng, requires_grad=True)] if sinks else [])]
    extra = (inputs[3] if sinks else None, 0.7, window, softcap)
    weight = torch.randn(tokens, heads[0], widths[1], generator=rng)
    both = []
    for function in (ops.attention, causal):
        out = function(*qkv, *extra)
        both.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for expected, actual in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
