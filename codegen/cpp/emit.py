"""From a plan to C++ text: the support headers, one header per kernel kind, and ``step.cpp``.

Pure: the same plan and target give the same bytes.  ``step.cpp`` includes everything, so the library is
one translation unit; ``codegen/ABI.md`` is the interface that it exports.
"""

from __future__ import annotations

from importlib.resources import files
from types import ModuleType

from ...ir.plan import DTYPE_BYTES, Extern, KernelSpec, Operand, Plan
from ..text import call, fill, symbols
from . import (
    attend,
    cache_write,
    chain,
    codebook,
    custom,
    embed,
    experts,
    latent_attend,
    linear,
    norm,
    pointwise,
    rope,
    route,
    select_rows,
    tiles,
)
from .target import CpuTarget

EMITTERS: dict[str, ModuleType] = {
    "embed": embed,
    "select_rows": select_rows,
    "norm": norm,
    "linear": linear,
    "pointwise": pointwise,
    "rope": rope,
    "cache_write": cache_write,
    "attend": attend,
    "latent_attend": latent_attend,
    "route": route,
    "experts": experts,
    "custom": custom,
    "chain": chain,
}
SUPPORT = ("simd.h", "weights.h", "matmul.h", "pool.h", "cache.h", "attention.h", "route.h")
INPUTS = {
    "ids": "a.ids",
    "positions": "a.positions",
    "rows": "a.row_index",
    "starts": "a.starts",
    "block_table": "a.block_table",
}
C_TYPES = {"f32": "float", "i32": "int32_t"}
ROWS = {"tokens": "a.tokens", "rows": "a.rows", "fixed": "1"}


def emit(plan: Plan, target: CpuTarget) -> dict[str, str]:
    """File name -> text, ``step.cpp`` being the one to compile."""
    names = symbols(plan, EMITTERS)
    sources = {name: _support(name) for name in SUPPORT}
    sources["tiles.h"] = tiles.emit(tiles.TILES[target.name])
    if books := codebook.used(plan):
        sources["codebooks.h"] = codebook.emit(books)
    for kind in EMITTERS:
        kernels = {s: n for s, n in names.items() if s.kind == kind}
        if kernels:
            sources[f"{kind}_kernels.h"] = _kind_header(kind, kernels)
    sources["step.cpp"] = _step_file(plan, target, names)
    return sources


def _support(name: str) -> str:
    return files(__package__).joinpath(name).read_text()


def _kind_header(kind: str, kernels: dict[KernelSpec, str]) -> str:
    module = EMITTERS[kind]
    body = "\n".join(module.emit(spec, name) for spec, name in kernels.items())
    about = (module.__doc__ or "").strip().split("\n")[0]
    return fill(KIND_HEADER, about=about, header=module.HEADER, body=body)


def _step_file(plan: Plan, target: CpuTarget, names: dict[KernelSpec, str]) -> str:
    kinds = [k for k in EMITTERS if any(s.kind == k for s in names)]
    headers = [f"{kind}_kernels.h" for kind in kinds]
    return fill(
        STEP_FILE,
        vector_bytes=target.vector_bytes,
        isa=target.isa,
        max_rows=max(plan.capacity.tokens, plan.capacity.rows, 1),
        includes="\n".join(
            f'#include "{h}"' for h in (*(["codebooks.h"] if codebook.used(plan) else []), *headers)
        ),
        shared=_largest(names, "SHARED"),
        local=_largest(names, "LOCAL"),
        cases=_cases(plan, names),
        externs=_extern_checks(plan),
    )


def _largest(names: dict[KernelSpec, str], constant: str) -> str:
    sizes = ["0", *(f"{name}::{constant}" for name in names.values())]
    return call(f"constexpr size_t {constant}_BYTES = largest({{", sizes, "});")


def _extern_checks(plan: Plan) -> str:
    at = [i for i, step in enumerate(plan.steps) if isinstance(step.spec, Extern)]
    return "\n".join(f"if (first <= {i} && {i} < last) return 1;" for i in at)


def _cases(plan: Plan, names: dict[KernelSpec, str]) -> str:
    """The switch over steps, each under its place in the user's model."""
    pointers = _pointers(plan)
    lines: list[str] = []
    for index, step in enumerate(plan.steps):
        where = " ".join(step.where.split())
        if isinstance(step.spec, Extern):
            lines.append(f"// {index}: {step.spec.op} runs in torch ({where})")
            continue
        args = [_argument(plan, pointers, step.bind[p]) for p in step.spec.params]
        head = f"  {names[step.spec]}::run("
        lines.append(f"case {index}:  // {where}")
        lines.append(call(head, ["th", ROWS[step.rows], *args], ");", indent=6))
        lines.append("  return;")
    return "\n".join(lines)


def _pointers(plan: Plan) -> dict[str, str]:
    """How step.cpp names the buffers that are not in the arena."""
    weights = [b.name for b in plan.buffers.values() if b.kind == "weight"]
    return {
        **INPUTS,
        **{name: f"a.weights[{i}]" for i, name in enumerate(weights)},
        **{cache.name: f"a.caches[{i}]" for i, cache in enumerate(plan.caches)},
    }


def _argument(plan: Plan, pointers: dict[str, str], operand: Operand) -> str:
    """What a kernel is given: a view of rows for the arena, a pointer for the rest."""
    buffer = plan.buffers[operand.buffer]
    if buffer.kind != "arena":
        return pointers[buffer.name]
    at = buffer.offset + operand.column * DTYPE_BYTES[buffer.dtype]
    return f"view<{C_TYPES[buffer.dtype]}>(a, {at}, {buffer.width})"


KIND_HEADER = """
// $about
#pragma once
#include "pool.h"
#include "$header"

namespace mill {

$body

}  // namespace mill
"""
STEP_FILE = """
// The whole step as one program: what tm_run executes, in order.
#define TM_VECTOR_BYTES $vector_bytes
namespace mill {
constexpr int MAX_ROWS = $max_rows;  // tokens or output rows that a step may carry
}
#include "pool.h"
$includes

namespace mill {

template <class T>
TM_INLINE Rows<T> view(const tm_args &a, size_t offset, int64_t width) {
  return {(T *)(a.arena + offset), width};
}

// Scratch of the most demanding kernel; a thread's own part fills whole pairs of cache lines.
template <size_t N>
constexpr size_t largest(const size_t (&sizes)[N]) {
  size_t most = 0;
  for (size_t s : sizes) most = s > most ? s : most;
  return (most + 127) / 128 * 128;
}
$shared
$local

static void step(int index, Thread &th) {
  const tm_args &a = *th.args;
  switch (index) {
    $cases
  }
}

static void program(Thread &th, int first, int last) {
  for (int i = first; i < last; i++) {
    step(i, th);
    th.barrier();
  }
}

}  // namespace mill

#define TM_EXPORT extern "C" __attribute__((visibility("default")))

TM_EXPORT int32_t tm_abi_version(void) { return 1; }
TM_EXPORT const char *tm_isa(void) { return "$isa"; }
TM_EXPORT void *tm_pool_create(int32_t threads) {
  return mill::pool_create(threads, mill::SHARED_BYTES, mill::LOCAL_BYTES, mill::program);
}
TM_EXPORT void tm_pool_destroy(void *pool) {
  if (pool) mill::pool_destroy((mill::Pool *)pool);
}
TM_EXPORT int64_t tm_workspace_bytes(int32_t threads) {
  return (int64_t)(mill::SHARED_BYTES + (size_t)threads * mill::LOCAL_BYTES);
}
// Steps [first, last); 1 if one of them is torch's to run.
TM_EXPORT int32_t tm_run(void *pool, const tm_args *args, int32_t first, int32_t last) {
  $externs
  mill::pool_run((mill::Pool *)pool, args, first, last);
  return 0;
}
"""
