"""Norm: RMS norm or layer norm per row and head, with the residual sum that precedes it."""

from __future__ import annotations

from ...ir.plan import Norm
from ..text import fill
from .expr import literal
from .text import signature

HEADER = "simd.h"


def symbol(spec: Norm) -> str:
    kind = "layer_norm" if spec.center else "rms_norm"
    heads = f"_h{spec.heads}" if spec.heads > 1 else ""
    return f"{kind}{heads}_w{spec.width}" + ("_residual" if spec.residual else "")


def emit(spec: Norm, name: str) -> str:
    channels = [p for p, there in (("weight", spec.weight), ("bias", spec.bias)) if there]
    value = "v * scale" + " * w" * spec.weight + " + b" * spec.bias
    return fill(
        TEMPLATE,
        symbol=name,
        equation=_equation(spec),
        heads=spec.heads,
        width=spec.width,
        eps=literal(spec.eps),
        signature=signature("Rows<float> x", *_params(spec), "Rows<float> out"),
        kept="sum" if spec.residual else "x",
        add=ADD_RESIDUAL if spec.residual else "",
        center=CENTER if spec.center else "",
        moment="centered * centered" if spec.center else "v * v",
        moment_value=MASKED if spec.center else "",
        minus_mean=" - mean" if spec.center else "",
        channels="\n".join(
            f"const vf {p[0]} = load_n((const float *){p} + i, WIDTH - i);" for p in channels
        ),
        value=value,
    )


def _equation(spec: Norm) -> str:
    x = "(x + residual)" if spec.residual else "x"
    body = f"({x} - mean) / std" if spec.center else f"{x} / rms({x.strip('()')})"
    return f"out = {body}" + (" * weight" if spec.weight else "") + (" + bias" if spec.bias else "")


def _params(spec: Norm) -> list[str]:
    return [
        *(["Rows<float> residual"] if spec.residual else []),
        *(["const void *weight"] if spec.weight else []),
        *(["const void *bias"] if spec.bias else []),
        *(["Rows<float> sum"] if spec.residual else []),
    ]


ADD_RESIDUAL = """
const float *a = x[r] + h * WIDTH, *b = residual[r] + h * WIDTH;
for (int i = 0; i < WIDTH; i += LANES)
  store_n(kept + i, load_n(a + i, WIDTH - i) + load_n(b + i, WIDTH - i), WIDTH - i);
""".strip()
CENTER = """
vf total = {};
for (int i = 0; i < WIDTH; i += LANES) total += load_n(kept + i, WIDTH - i);
const float mean = mill::sum(total) / WIDTH;
""".strip()
MASKED = "const vf centered = select(iota() + (float)i < (float)WIDTH, v - mean, vf{});"

TEMPLATE = """
// $equation,  per row and head of [rows, $heads, $width]
namespace $symbol {
constexpr int HEADS = $heads, WIDTH = $width;
constexpr float EPS = $eps;
constexpr size_t SHARED = 0, LOCAL = 0;

$signature
  for (int r = th.share(rows, 0); r < th.share(rows, 1); r++)
    for (int h = 0; h < HEADS; h++) {
      float *kept = $kept[r] + h * WIDTH;
      $add
      $center
      vf squares = {};
      for (int i = 0; i < WIDTH; i += LANES) {
        const vf v = load_n(kept + i, WIDTH - i);
        $moment_value
        squares += $moment;
      }
      const float scale = 1.0f / __builtin_sqrtf(mill::sum(squares) / WIDTH + EPS);
      for (int i = 0; i < WIDTH; i += LANES) {
        const vf v = load_n(kept + i, WIDTH - i)$minus_mean;
        $channels
        store_n(out[r] + h * WIDTH + i, $value, WIDTH - i);
      }
    }
}
}  // namespace $symbol
"""
