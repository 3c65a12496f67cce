"""Give attention a memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..ir import cache as kv
from ..ir.plan import gqa_cache, latent_cache
from ..ir.program import BATCH_INPUTS, Program, Stage, shape
from ..recipe import CacheFormat
from .base import Pass, calls, mill, replace, sweep


@dataclass
class InsertCache(Pass):
    """attention(q, k, v) = cached_attention(q, k, v, cache, batch): one graph for any ragged batch

    Every other op treats each token alone (see prove_tokens), so with positions, sequence boundaries and
    block tables as inputs, the graph of one sequence serves prefill, decode and mixtures of them.
    """

    format: CacheFormat = "bf16"
    name = "insert_cache"
    produces = Stage.CACHED
    tolerance = None  # the cache's format rounds keys and values

    def __post_init__(self) -> None:
        if self.format == "fp32":
            self.tolerance = 1e-4

    def run(self, program: Program) -> int:
        starts, table = (_input(program, name, torch.int32) for name in BATCH_INPUTS)
        batch = (program.input("positions"), starts, table)
        nodes = list(calls(program, mill.attention, mill.latent_attention))
        for i, node in enumerate(nodes):
            convert = self._latent if node.target is mill.latent_attention.default else self._plain
            convert(program, node, f"cache.{i}", batch)
        sweep(program)
        return len(nodes)

    def _plain(
        self, program: Program, node: fx.Node, name: str, batch: tuple[fx.Node, ...]
    ) -> None:
        q, k, v, sinks, scale, window, softcap, *slopes = node.args
        heads, dim = (int(s) for s in shape(k)[-2:])
        cache = _cache(program, gqa_cache(name, self.format, heads, dim, int(shape(v)[-1])))
        args = (q, k, v, sinks, cache, *batch, scale, window, softcap, self.format, *slopes)
        with program.graph.inserting_before(node):
            replace(program, node, program.call(mill.cached_attention.default, *args, like=node))

    def _latent(
        self, program: Program, node: fx.Node, name: str, batch: tuple[fx.Node, ...]
    ) -> None:
        q, latent, rope, up, down, weight_format, scale = node.args
        spec = latent_cache(name, self.format, int(shape(latent)[-1]), int(shape(rope)[-1]))
        args = (
            q,
            latent,
            rope,
            up,
            down,
            _cache(program, spec),
            *batch,
            weight_format,
            scale,
            self.format,
        )
        with program.graph.inserting_before(node):
            replace(
                program, node, program.call(mill.cached_latent_attention.default, *args, like=node)
            )


def _cache(program: Program, spec: kv.CacheSpec) -> fx.Node:
    program.caches.append(spec)
    return _input(program, spec.name, torch.uint8, (1, kv.PAGE, spec.row_bytes))


def _input(
    program: Program, name: str, dtype: torch.dtype, size: tuple[int, ...] | None = None
) -> fx.Node:
    last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder(name)
    sizes = size or ((2,) if name == "starts" else (1, 1))
    node.meta["val"] = program.fake(torch.empty(sizes, dtype=dtype, device="meta"))
    return node
