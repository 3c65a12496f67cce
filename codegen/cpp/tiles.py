"""Sizes that kernels are cut into, per target: the one place to change them.

Measured with ``benchmarks/cpu.py``; codegen/README.md tells how to try others.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..text import fill


@dataclass(frozen=True)
class Tiles:
    """``tokens``: rows of activations that one pass over a panel of weights serves, smallest first.  A
    product takes the largest for whole tiles and the smallest that fits for the rest.  INT8 sums need
    twice ``tokens`` accumulators of 16 values, and some registers more.
    ``block_kib``: packed activations of one job; they should stay in a core's own cache beside a panel.
    ``alone_tokens``: up to here every thread packs all activations itself, which is cheaper than a barrier.
    ``few_rows``: up to so many query rows of a kv head, at most 16, keys fill the lanes of attention
    instead of queries.
    """

    tokens: tuple[int, ...]
    block_kib: int = 512
    alone_tokens: int = 4
    few_rows: int = 16


# By target; 32 registers of 512 bits, 16 of 256, 16 or 32 of 128.
TILES = {
    "cpu-x86-64-v4-bf16": Tiles((1, 2, 4, 8, 12)),
    "cpu-x86-64-v4-vnni": Tiles((1, 2, 4, 8, 12)),
    "cpu-x86-64-v4": Tiles((1, 2, 4, 8)),
    "cpu-x86-64-v3-vnni": Tiles((1, 2, 3), block_kib=256),
    "cpu-x86-64-v3": Tiles((1, 2), block_kib=256),
    "cpu-x86-64": Tiles((1,), block_kib=256, few_rows=12),
    "cpu-aarch64-bf16": Tiles((1, 2), block_kib=256, few_rows=12),
    "cpu-aarch64-dot": Tiles((1, 2), block_kib=256, few_rows=12),
    "cpu-aarch64": Tiles((1, 2), block_kib=256, few_rows=12),
}


def emit(tiles: Tiles) -> str:
    """The header ``tiles.h``."""
    return fill(
        TEMPLATE,
        sizes=" ".join(f"F({n})" for n in tiles.tokens),
        largest=tiles.tokens[-1],
        block=tiles.block_kib << 10,
        alone=tiles.alone_tokens,
        few=tiles.few_rows,
    )


TEMPLATE = """
// Sizes that kernels are cut into on this target (codegen/cpp/tiles.py says what they mean).
#pragma once

#define TM_TILES(F) $sizes
namespace mill {
constexpr int TILE_TOKENS = $largest, ALONE_TOKENS = $alone, BLOCK_BYTES = $block, FEW_ROWS = $few;
}
"""
