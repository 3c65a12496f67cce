"""Attention over caches that come in and go out, in standard ops.

A step is ``[B, S]`` tokens after ``P`` in the cache.  A query sees the keys before it that ``attention_mask
[B, P + S]`` does not hide, the window - 1 last of them if there is a window; places are counted along the
cache, so padding goes to the left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir
import torch

from ..ir.cache import CacheSpec
from ._onnx_graph import Graph
from ._onnx_weights import Matrix, dense

HIDDEN = -1e30  # added to scores of hidden keys; finite, so that a row of padding is no 0 / 0
PAST, PRESENT = "past_key_values", "present"


@dataclass(frozen=True)
class Cache:
    """What a layer remembers: ``past`` by part, and the names and shapes of what is remembered after it."""

    layer: int
    spec: CacheSpec


class Step:
    """The inputs of a step, and what all layers need of them."""

    def __init__(self, g: Graph) -> None:
        self._g = g
        self._bias: dict[int, ir.Value] = {}
        self.ids = g.input("input_ids", torch.int64, ["batch", "length"])
        self.mask = g.input("attention_mask", torch.int64, ["batch", "total"])
        self.position_ids = g.input("position_ids", torch.int64, ["batch", "length"])
        self.batch, self.length = g.sizes(self.ids, 0, 1), g.sizes(self.ids, 1, 2)
        self.tokens = g.reshape(self.ids, 1, -1)
        self.positions = g.reshape(self.position_ids, 1, -1)

    @cached_property
    def distance(self) -> ir.Value:
        """How far key j is from query i, ``[S, P + S]`` int64: 0 at itself, negative before it."""
        g = self._g
        total = g.sizes(self.mask, 1, 2)
        one, none = g.scalar(1, torch.int64), g.scalar(0, torch.int64)
        first = g.op("Sub", total, self.length)
        end, begin = (g.op("Squeeze", x, g.ints(0)) for x in (total, first))
        keys = g.op("Range", none, end, one)
        queries = g.op("Unsqueeze", g.op("Range", begin, end, one), g.ints(1))
        return g.op("Sub", keys, queries)

    def bias(self, window: int) -> ir.Value:
        """What is added to scores: 0, or HIDDEN; ``[B, 1, 1, S, P + S]``."""
        if window not in self._bias:
            g = self._g
            seen = g.op("LessOrEqual", self.distance, g.scalar(0, torch.int64))
            if window:
                near = g.op("Greater", self.distance, g.scalar(-window, torch.int64))
                seen = g.op("And", seen, near)
            real = g.op("Unsqueeze", g.cast(self.mask, torch.bool), g.ints(1))
            seen = g.op("Unsqueeze", g.op("And", seen, real), g.ints(1, 2))
            self._bias[window] = g.op("Where", seen, g.scalar(0.0), g.scalar(HIDDEN))
        return self._bias[window]

    # --- attention ---

    def attend(
        self, cache: Cache, q: ir.Value, k: ir.Value, v: ir.Value, sinks: ir.Value | None,
        slopes: ir.Value | None, sizes: tuple[int, int, int, int], scale: float, window: int,
        softcap: float,
    ) -> ir.Value:  # fmt: skip
        """Grouped-query attention; ``q [.., H, D]``, ``k, v [.., Hkv, D | Dv]`` of all tokens.

        ``sizes`` are H, Hkv, D, Dv.
        """
        g = self._g
        heads, shared, dim, value_dim = sizes
        group = heads // shared
        keys = self._remember(cache, "key", k, shared, dim)
        values = self._remember(cache, "value", v, shared, value_dim)
        q = g.reshape(q, self.batch, self.length, shared, group, dim)
        q = g.transpose(q, 0, 2, 3, 1, 4)
        out = self._mix(
            q, keys, values, (shared, group, dim, value_dim), scale, window, softcap, sinks, slopes
        )
        return g.reshape(g.transpose(out, 0, 3, 1, 2, 4), 1, -1, heads, value_dim)

    def attend_latent(
        self, cache: Cache, q: ir.Value, latent: ir.Value, k_rope: ir.Value, w_uk: Matrix,
        w_uv: Matrix, scale: float,
    ) -> ir.Value:  # fmt: skip
        """Multi-head latent attention, absorbed: one key for all heads, the latent and the rotary key."""
        g = self._g
        heads, nope, rank = *w_uk.lead, w_uk.n, w_uk.k
        width = cache.spec.width
        rows = self._rows(latent, k_rope, rank, width - rank)
        keys = self._extend(cache, "latent", rows, ["batch", "total", width], axis=1)
        q = g.reshape(q, -1, heads, nope + width - rank)
        plain, turned = g.ops(
            "Split", 2, g.transpose(q, 1, 0, 2), g.ints(nope, width - rank), axis=-1
        )
        q = g.op("Concat", g.op("MatMul", plain, dense(g, w_uk)), turned, axis=-1)
        q = g.transpose(g.reshape(q, heads, self.batch, self.length, width), 1, 0, 2, 3)
        q, keys = g.op("Unsqueeze", q, g.ints(1)), g.op("Unsqueeze", keys, g.ints(1))
        # Mixing whole rows and cutting once is cheaper than cutting the latents out of all rows.
        out = self._mix(q, keys, keys, (1, heads, width, width), scale, 0, 0.0, None, None)
        out = g.cut(g.reshape(out, self.batch, heads, self.length, width), -1, 0, rank)
        out = g.reshape(g.transpose(out, 1, 0, 2, 3), heads, -1, rank)
        out = g.op("MatMul", out, g.transpose(dense(g, w_uv), 0, 2, 1))
        return g.reshape(g.transpose(out, 1, 0, 2), 1, -1, heads, w_uv.n)

    def _mix(
        self, q: ir.Value, keys: ir.Value, values: ir.Value, sizes: tuple[int, int, int, int],
        scale: float, window: int, softcap: float, sinks: ir.Value | None, slopes: ir.Value | None,
    ) -> ir.Value:  # fmt: skip
        """softmax(scale q k^T + bias) v for ``q [B, Hkv, G, S, D]`` and ``keys [B, Hkv, L, D]``.

        Queries of one group stand below one another, so keys are never repeated.
        """
        g = self._g
        shared, group, dim, value_dim = sizes
        rows = g.reshape(q, self.batch, shared, -1, dim)
        rows = g.op("Mul", rows, g.scalar(scale))
        scores = g.op("MatMul", rows, g.transpose(keys, 0, 1, 3, 2))
        scores = g.reshape(scores, self.batch, shared, group, self.length, -1)
        if softcap:
            cap = g.scalar(softcap)
            scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, cap)), cap)
        if slopes is not None:
            ahead = g.cast(self.distance, torch.float32)
            steep = g.reshape(slopes, shared, group, 1, 1)
            scores = g.op("Add", scores, g.op("Mul", steep, ahead))
        scores = g.op("Add", scores, self.bias(window))
        if sinks is not None:
            column = g.reshape(sinks, 1, shared, group, 1, 1)
            column = g.op("Expand", column, g.shape(self.batch, 1, 1, self.length, 1))
            scores = g.op("Concat", scores, column, axis=-1)
        share = g.op("Softmax", scores, axis=-1)
        if sinks is not None:
            share = g.cut(share, -1, 0, -1)
        share = g.reshape(share, self.batch, shared, -1, g.sizes(keys, 2, 3))
        out = g.op("MatMul", share, values)
        return g.reshape(out, self.batch, shared, group, self.length, value_dim)

    # --- caches ---

    def _remember(self, cache: Cache, part: str, x: ir.Value, heads: int, dim: int) -> ir.Value:
        """Keys or values of past and present, ``[B, Hkv, P + S, D]``."""
        g = self._g
        x = g.transpose(g.reshape(x, self.batch, self.length, heads, dim), 0, 2, 1, 3)
        return self._extend(cache, part, x, ["batch", heads, "total", dim], axis=2)

    def _rows(self, latent: ir.Value, k_rope: ir.Value, rank: int, rotary: int) -> ir.Value:
        g = self._g
        parts = [
            g.reshape(x, self.batch, self.length, size)
            for x, size in ((latent, rank), (k_rope, rotary))
        ]
        return g.op("Concat", *parts, axis=-1)

    def _extend(
        self, cache: Cache, part: str, x: ir.Value, sizes: list[int | str], axis: int
    ) -> ir.Value:
        g = self._g
        before = ["past" if size == "total" else size for size in sizes]
        past = g.input(f"{PAST}.{cache.layer}.{part}", torch.float32, before)
        whole = g.op("Concat", past, x, axis=axis)
        g.output(whole, f"{PRESENT}.{cache.layer}.{part}", sizes)
        return whole
