// Sizes that kernels are cut into on this target (codegen/cpp/tiles.py says what they mean).
#pragma once

#define TM_TILES(F) F(1) F(2)
namespace mill {
constexpr int TILE_TOKENS = 2, ALONE_TOKENS = 4, BLOCK_BYTES = 262144, FEW_ROWS = 16;
}
