"""Linear: a matrix product whose epilogue runs on the accumulators, weights read as they are packed."""

from __future__ import annotations

from ...ir.plan import Linear
from ..text import fill, format_name
from .expr import vector_code
from .text import signature, weight_params, weight_parts, weight_type

HEADER = "matmul.h"


def symbol(spec: Linear) -> str:
    parts = f"_p{spec.parts}" if spec.parts > 1 else ""
    fused = "_fused" if spec.epilogue != "acc0" else ""
    bias = "_bias" if spec.bias else ""
    return f"linear_n{spec.n}_k{spec.k}_{format_name(spec.format)}{parts}{bias}{fused}"


def emit(spec: Linear, name: str) -> str:
    bias = " + bias[p N + n]" if spec.bias else ""
    parts = range(spec.parts)
    return fill(
        TEMPLATE,
        symbol=name,
        n=spec.n,
        k=spec.k,
        parts=spec.parts,
        weight=weight_type(spec.format),
        equation=f"out[t, n] = {spec.epilogue},  acc_p = w[p N + n, :] . x[t, :]{bias}",
        signature=signature("Rows<float> x", *_params(spec), "Rows<float> out"),
        members=weight_parts(spec.format),
        tiles="\n".join(f"float *y{p} = scratch.take<float>(TOKENS * PANEL);" for p in parts),
        products="\n".join(
            f"product(weight, PARTS * panel + {p}, xs, tokens, y{p}, PANEL);" for p in parts
        ),
        loads="\n".join([*(_accumulator(spec, p) for p in parts), *_extras(spec)]),
        value=vector_code(spec.epilogue),
    )


def _params(spec: Linear) -> list[str]:
    bias = ["const void *bias"] if spec.bias else []
    kinds = {"row": "Rows<float> ", "channel": "const void *"}
    extras = [f"{kinds[kind]}x{i}" for i, kind in enumerate(spec.extras)]
    return [*weight_params(spec.format), *bias, *extras]


def _accumulator(spec: Linear, part: int) -> str:
    product = f"load(y{part} + t * PANEL + i)"
    if not spec.bias:
        return f"const vf acc{part} = {product};"
    at = f"(const float *)bias + {part} * N + n0 + i"
    return f"const vf bias{part} = load_n({at}, count - i);\nconst vf acc{part} = {product} + bias{part};"


def _extras(spec: Linear) -> list[str]:
    source = {"row": "x{i}[t0 + t]", "channel": "(const float *)x{i}"}
    return [
        f"const vf e{i} = load_n({source[kind].format(i=i)} + n0 + i, count - i);"
        for i, kind in enumerate(spec.extras)
    ]


TEMPLATE = """
// $equation
// x [rows, $k], w [$parts * $n, $k], out [rows, $n]
namespace $symbol {
constexpr int N = $n, K = $k, PARTS = $parts, PANELS = panels(N);
using W = $weight;
using Inputs = W::Inputs;
constexpr size_t ROW = Inputs::bytes(K);
constexpr int TOKENS = block_tokens(ROW);
constexpr size_t SHARED = Scratch::sizes<uint8_t>(MAX_ROWS * ROW);
constexpr size_t LOCAL = Scratch::sizes<uint8_t>(ALONE_TOKENS * ROW) +
                         PARTS * Scratch::sizes<float>(TOKENS * PANEL);

$signature
  const W weight{{$members, PARTS * N, K}};
  Scratch shared{th.shared}, scratch{th.local};
  uint8_t *together = shared.take<uint8_t>(MAX_ROWS * ROW);
  uint8_t *alone = scratch.take<uint8_t>(ALONE_TOKENS * ROW);
  $tiles
  const uint8_t *packed = pack_rows<Inputs>(th, x, rows, K, together, alone);

  // A job is one panel of output columns for one block of tokens.
  const int blocks = ceil_div(rows, TOKENS);
  for (Jobs jobs(th, blocks * PANELS); jobs.next();) {
    const int t0 = jobs.at / PANELS * TOKENS, tokens = min(TOKENS, rows - t0);
    const int panel = jobs.at % PANELS, n0 = panel * PANEL, count = min(PANEL, N - n0);
    const uint8_t *xs[TOKENS];
    for (int t = 0; t < tokens; t++) xs[t] = packed + (t0 + t) * ROW;
    $products
    for (int t = 0; t < tokens; t++)
      for (int i = 0; i < count; i += LANES) {
        $loads
        store_n(out[t0 + t] + n0 + i, $value, count - i);
      }
  }
}
}  // namespace $symbol
"""
