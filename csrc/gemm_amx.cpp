// The product of bfloat16 pairs by AMX's tiles; all else is AVX-512 BF16's.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

constexpr uint32_t kNeeds = kAvx2 | kAvx512 | kAvx512Bf16 | kAmxBf16;

constexpr int kTileRows = 16, kTileUnits = 16;
constexpr int64_t kTileBytes = kPanel * 4;

#include "tiles.inc"

void begin() {
  Tiles tiles;
  for (int t = 0; t < 8; ++t) tiles.set(t, kTileRows, 4 * kTileUnits);
  configure(tiles);
}

#define TILE_START(N, TILE)             \
  do {                                  \
    if (add) {                          \
      _tile_loadd(N, TILE, kTileBytes); \
    } else {                            \
      _tile_zero(N);                    \
    }                                   \
  } while (false)

// Tiles 0 to 3 hold 32 rows × 32 columns of sums, or half of them in either direction; 4 and 5 are rows of the left
// matrix, 6 and 7 columns of the panel.
template <bool ROWS32, bool COLUMNS32>
void multiply_tiles(float* tile, const char* left, int64_t stride, const uint32_t* panel, int units, bool add) {
  float* below = tile + kTileRows * kPanel;
  const char* lower = left + kTileRows * stride;
  TILE_START(0, tile);
  if constexpr (COLUMNS32) TILE_START(1, tile + kTileUnits);
  if constexpr (ROWS32) TILE_START(2, below);
  if constexpr (ROWS32 && COLUMNS32) TILE_START(3, below + kTileUnits);
  for (int u = 0; u < units; u += kTileUnits) {
    _tile_loadd(4, left + 4 * u, stride);
    _tile_loadd(6, panel + u * kPanel, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (COLUMNS32) {
      _tile_loadd(7, panel + u * kPanel + kTileUnits, kTileBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS32) {
      _tile_loadd(5, lower + 4 * u, stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (COLUMNS32) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, tile, kTileBytes);
  if constexpr (COLUMNS32) _tile_stored(1, tile + kTileUnits, kTileBytes);
  if constexpr (ROWS32) _tile_stored(2, below, kTileBytes);
  if constexpr (ROWS32 && COLUMNS32) _tile_stored(3, below + kTileUnits, kTileBytes);
}

// Tiles are whole: rows beyond the last are computed from anything that the left block holds there, and never read.
void multiply(const Product& job) {
  for (int c = 0; c < job.columns; c += kPanel) {
    const uint32_t* panel = job.right + c / kPanel * job.right_stride;
    const bool wide = job.columns - c > kTileUnits;
    for (int r = 0; r < job.rows; r += 2 * kTileRows) {
      float* to = job.tiles + (c / kPanel * kRows + r) * kPanel;
      const char* from = job.left + r * job.left_stride;
      const bool both = job.rows - r > kTileRows;
      const auto tiles = wide ? (both ? multiply_tiles<true, true> : multiply_tiles<false, true>)
                              : (both ? multiply_tiles<true, false> : multiply_tiles<false, false>);
      tiles(to, from, job.left_stride, panel, job.units, job.add);
    }
  }
}

END_LEVEL(AmxGemm kAmxGemm = {kNeeds, begin, release, multiply})
