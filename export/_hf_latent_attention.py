"""Latent attention of an artifact in the terms of transformers' classes.

They normalise latents and the artifact does not, so one more latent is a constant B: beside latents c with
|c| << B the root mean square of all D is B / sqrt(D), and B / sqrt(D) as the norm's weight undoes it up to a
share of |c|^2 / 2 B^2.  Layers have latents of several ranks and a class has one: what is missing is zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..errors import Unsupported
from ..ir.program import Program, shape
from ..passes.base import behind_reshapes, calls, is_call, mill

ADVICE = "export --format onnx keeps the graph as it is"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
_OUTWEIGHS = 1024.0  # a bound of the latents: the norm is off by a share of 5e-7 at most
_SAMPLES = 4096  # positions at which angles are compared


@dataclass(frozen=True)
class Attention:
    """What all layers share, and the rank of each.

    Queries are ``width`` values that meet latents and ``rotary`` that rotate.  ``frequencies [rotary / 2]``
    are in radians a position, and cosines and sines are times ``modulus``.
    """

    ranks: Mapping[int, int]
    heads: int
    width: int
    rotary: int
    value_width: int
    scale: float
    frequencies: Tensor
    modulus: float

    @property
    def latents(self) -> int:
        """How many the class has, the constant among them."""
        return max(self.ranks.values()) + 1

    @property
    def query_scale(self) -> float:
        """What queries are multiplied with, since the class scales scores by its own rule."""
        return self.scale * math.sqrt(self.width + self.rotary)

    def config(self, positions: int, whole_heads: bool) -> dict[str, Any]:
        """The fields of config.json; ``positions`` are the most that the model knows.

        With ``whole_heads`` the class counts the values that do not rotate when it asks for frequencies.
        """
        # Of longrope only the factors are left: they divide powers of a base that is 1, whatever the length.
        factors = [float(1 / f) for f in self.frequencies]
        # Half a value more, since the library rounds what it multiplies down.
        size = self.width + self.rotary
        share = {"partial_rotary_factor": (self.rotary + 0.5) / size, "llama_4_scaling_beta": 0.0}
        return {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "q_lora_rank": None,
            "kv_lora_rank": self.latents,
            "qk_nope_head_dim": self.width,
            "qk_rope_head_dim": self.rotary,
            "v_head_dim": self.value_width,
            "attention_bias": True,
            "rope_interleave": False,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1.0,
                "factor": 1.0,
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": self.modulus,
                "original_max_position_embeddings": positions,
                **(share if whole_heads else {}),
            },
        }


def attention_of(program: Program) -> Attention:
    """The latent attention of a finished program; raises Unsupported if its layers differ in kind."""
    ranks: dict[int, int] = {}
    found: set[tuple[Any, ...]] = set()
    for node in calls(program, mill.cached_latent_attention):
        query, latent, rotary, up = node.args[:4]
        name = str(up[0].target)
        if (layer := LAYER.match(name)) is None:
            raise refused("its layers are not called model.layers.N", name)
        ranks[int(layer[1])] = int(shape(latent)[-1])
        sizes = (int(shape(query)[-2]), int(shape(rotary)[-1]), int(shape(node)[-1]))
        found.add((*sizes, float(node.args[10]), *_rope(query)))
    if len(found) != 1:
        raise refused("heads, scales or angles differ from layer to layer", "attention")
    heads, rotary, value_width, scale, cos, sin, width = found.pop()
    frequencies, modulus = angles(*(program.weights[t].double() for t in (cos, sin)))
    return Attention(ranks, heads, width, rotary, value_width, scale, frequencies, modulus)


def _rope(query: fx.Node) -> tuple[str, str, int]:
    """The tables of cosines and sines, and where in a head the values that rotate begin."""
    node = behind_reshapes(query)
    if not is_call(node, mill.rope) or node.args[4]:
        raise refused("its queries are not rotated in halves", node.name)
    tables = [behind_reshapes(n) for n in node.args[1:3]]
    if not all(is_call(t, mill.embed) for t in tables):
        raise refused("its angles are not looked up by position", node.name)
    cos, sin = (str(t.args[0][0].target) for t in tables)
    return cos, sin, int(node.args[3])


def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, float]:
    """Frequencies ``[P]`` and modulus of tables ``[positions, P]``.

    A frequency is read at position 1 and refined at 2, 4, ..., where it shows as often as that; of the fp32
    numbers beside it the one is taken whose multiples, in fp32, are closest.  Raises Unsupported if angles
    are no multiples of the position.
    """
    length, angle = torch.hypot(cos, sin), torch.atan2(sin, cos)
    modulus = float(length.mean().float())  # fp32 shows no more of it
    if len(cos) < 2 or float((length - modulus).abs().max()) > 1e-5 * modulus:
        raise refused("its rotary angles stretch what they rotate unevenly", "rope")
    frequency, position = angle[1].clone(), 2
    while position < len(cos):
        behind = angle[position] - position * frequency
        frequency += (torch.remainder(behind + math.pi, 2 * math.pi) - math.pi) / position
        position *= 2
    at = torch.arange(len(cos))[:: max(1, len(cos) // _SAMPLES)]
    wanted = torch.complex(cos[at], sin[at]) / modulus
    best, least = frequency, torch.full_like(frequency, torch.inf)
    for ulps in range(-3, 4):
        # As the class computes them: the inverse of a factor in fp32.
        factor = (1 / frequency).float() * (1 + ulps * 2.0**-24)
        turned = (at[:, None].float() * (1.0 / factor)).double()
        error = (torch.polar(torch.ones_like(turned), turned) - wanted).abs().amax(0)
        best, least = torch.where(error < least, 1 / factor.double(), best), least.minimum(error)
    if bool((frequency <= 0).any()) or float(least.max()) > 1e-5 + 1e-6 * len(cos):
        raise refused("its rotary angles are no multiples of the position", "rope")
    return best, modulus


def refused(reason: str, where: str) -> Unsupported:
    return Unsupported(reason=reason, where=where, advice=ADVICE)


# --- weights ----------------------------------------------------------------------------------------


def down(latent: Tensor, rotary: Tensor, latents: int) -> Tensor:
    """``kv_a_proj_with_mqa``: latents, those that are zero or constant, and the rotary key."""
    return torch.cat((F.pad(latent, (0, 0, 0, latents - len(latent))), rotary))


def up(keys: Tensor, values: Tensor, latents: int) -> Tensor:
    """``kv_b_proj`` of ``keys [H, d, R]`` and ``values [H, v, R]``: what the norm changed is undone."""
    weight, base = _balanced(latents)
    both = torch.cat((keys, values), 1) * (base / (weight * math.sqrt(latents)))
    return F.pad(both, (0, latents - both.shape[-1])).flatten(0, 1)


def constant(latent: Tensor, gain: Tensor, latents: int) -> tuple[float, float]:
    """The constant latent, and the norm's weight that leaves the others all but as they are.

    ``latent [R, n]`` makes latents of what a norm with the weights ``gain [n]`` yields.  Both are numbers
    that bf16 has, so that rounding does no harm; the others are left times a factor that differs from 1
    by 0.2% at most and depends on ``latents`` alone: ``up`` divides by it.
    """
    bound = float((latent * gain).norm()) * math.sqrt(len(gain))
    weight, base = _balanced(latents)
    exponent = math.ceil(math.log2(_OUTWEIGHS * max(1.0, bound) / base))
    return math.ldexp(base, exponent), math.ldexp(weight, exponent)


def _balanced(latents: int) -> tuple[int, float]:
    """A norm's weight and a constant, of eight bits each, whose ratio is about ``sqrt(latents)``."""
    ratio = math.sqrt(latents)
    weight = min(range(128, 256), key=lambda w: abs(_eight_bits(w * ratio) / (w * ratio) - 1))
    return weight, _eight_bits(weight * ratio)


def _eight_bits(value: float) -> float:
    exponent = math.frexp(value)[1] - 8
    return math.ldexp(round(math.ldexp(value, -exponent)), exponent)
