"""Rotary embeddings are recognised however they are written, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tokenmill.capture.module import capture
from tokenmill.errors import Unsupported
from tokenmill.ir.program import Program
from tokenmill.passes.base import calls, mill
from tokenmill.passes.pipeline import pipeline, run_passes
from tokenmill.recipe import Recipe
from torch import Tensor, nn

HEADS, DIM, ROTARY, POSITIONS = 4, 16, 8, 128
Rotate = Callable[[Tensor, Tensor], Tensor]  # (x [1, H, T, D], angles [T, ROTARY / 2])


def halves(x: Tensor, angles: Tensor) -> Tensor:
    """The first columns, as rotated halves with doubled tables."""
    cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
    part, rest = x[..., :ROTARY], x[..., ROTARY:]
    a, b = part.chunk(2, -1)
    return torch.cat((part * cos + torch.cat((-b, a), -1) * sin, rest), -1)


def trailing(x: Tensor, angles: Tensor) -> Tensor:
    """The last columns."""
    rest, part = x.split([DIM - ROTARY, ROTARY], -1)
    a, b = part.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((rest, a * cos - b * sin, b * cos + a * sin), -1)


def pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Interleaved pairs."""
    even, odd = x[..., 0:ROTARY:2], x[..., 1:ROTARY:2]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., ROTARY:]), -1)


def pairs_to_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Interleaved in, halves out, as DeepSeek-V3."""
    even, odd = x[..., 0:ROTARY:2], x[..., 1:ROTARY:2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin, x[..., ROTARY:]), -1)


def complex_product(x: Tensor, angles: Tensor) -> Tensor:
    """Complex numbers, as DeepSeek-V2."""
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x[..., :ROTARY].reshape(*x.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    return torch.cat((turned, x[..., ROTARY:]), -1)


def scaled_tables(x: Tensor, angles: Tensor) -> Tensor:
    """Tables that carry a factor, as yarn's."""
    a, b = x[..., :ROTARY].chunk(2, -1)
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., ROTARY:]), -1)


def reversed_turn(x: Tensor, angles: Tensor) -> Tensor:
    """Angles that run backwards: the same form, with other tables."""
    return trailing(x, -angles)


def nothing(x: Tensor, angles: Tensor) -> Tensor:
    return x


class Decoder(nn.Module):
    def __init__(self, rotate: Rotate, heads_kv: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotate, self.kv = rotate, heads_kv
        self.embed, self.head = nn.Embedding(32, 24), nn.Linear(24, 32)
        self.q = nn.Linear(24, HEADS * DIM)
        self.kv_proj = nn.Linear(24, 2 * heads_kv * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, 24)
        self.register_buffer("freq", 10000.0 ** (-torch.arange(0, ROTARY, 2) / ROTARY))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        angles = torch.outer(torch.arange(ids.shape[1]), self.freq)
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = (
            t.repeat_interleave(HEADS // self.kv, 1)
            for t in self.kv_proj(x).unflatten(-1, (2, self.kv, DIM)).permute(2, 0, 3, 1, 4)
        )
        q, k = self.rotate(q, angles), self.rotate(k, angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).flatten(-2)))


def compiled(rotate: Rotate, heads_kv: int = 2) -> Program:
    """All passes, each executed before and after."""
    program = capture(Decoder(rotate, heads_kv), max_positions=POSITIONS)
    run_passes(program, pipeline(Recipe(weights="fp32", kv="fp32")), check=True)
    return program


@pytest.mark.parametrize(
    ("rotate", "offset", "interleaved"),
    [
        (halves, 0, False),
        (trailing, DIM - ROTARY, False),
        (pairs, 0, True),
        (pairs_to_halves, 0, False),
        (complex_product, 0, True),
        (scaled_tables, 0, False),
        (reversed_turn, DIM - ROTARY, False),
    ],
)
def test_every_spelling_is_one_op(rotate: Rotate, offset: int, interleaved: bool) -> None:
    found = list(calls(compiled(rotate), mill.rope))
    assert [tuple(n.args[3:5]) for n in found] == [(offset, interleaved)] * 2
    assert {n.args[1] for n in found} == {found[0].args[1]}, "queries and keys share the tables"


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_repeated_keys_are_cached_once(heads_kv: int) -> None:
    assert [c.width for c in compiled(halves, heads_kv).caches] == [2 * heads_kv * DIM]


def test_no_rotation_is_no_rotation() -> None:
    assert list(calls(compiled(nothing), mill.rope)) == []


def fading(x: Tensor, angles: Tensor) -> Tensor:
    """Depends on the position, but is no rotation."""
    return torch.cat((x[..., :4] * angles.cos(), x[..., 4:]), -1)


def test_what_is_no_rotary_embedding_is_refused() -> None:
    with pytest.raises(Unsupported, match="rotary"):
        compiled(fading)
