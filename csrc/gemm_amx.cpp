// The product of bfloat16 pairs by AMX's tiles; all else is AVX-512 BF16's.
//
// With HANDFUL_EMULATE_AMX the tiles are arrays and the instructions loops, with the same layout and the same counts,
// for a CPU without AMX.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

constexpr uint32_t kNeeds = kAvx2 | kAvx512 | kAvx512Bf16 | kAmxBf16;

constexpr int kTileRows = 16, kTileUnits = 16;
constexpr int64_t kTileBytes = kPanel * 4;

// Macros, because a tile's number is part of the instruction. The compiler does not know what memory the instructions
// read and write; all of it belongs to callers that reach this file by a pointer.
#ifdef HANDFUL_EMULATE_AMX

thread_local uint32_t tiles[8][kTileRows][kTileUnits];
thread_local bool configured = false;

void begin() { configured = true; }
void end() { configured = false; }

template <int N>
void tile_zero() {
  std::memset(tiles[N], 0, sizeof tiles[N]);
}

template <int N>
void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r) std::memcpy(tiles[N][r], static_cast<const char*>(from) + r * stride, 64);
}

template <int N>
void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tiles[N][r], 64);
}

float upper(uint32_t unit) {
  const uint32_t bits = unit & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <int C, int A, int B>
void tile_product() {
  if (!configured) __builtin_trap();  // as the instruction does
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < kTileUnits; ++c) {
      float sum;
      std::memcpy(&sum, &tiles[C][r][c], 4);
      for (int u = 0; u < kTileUnits; ++u) {
        const uint32_t a = tiles[A][r][u], b = tiles[B][u][c];
        sum += upper(a << 16) * upper(b << 16);
        sum += upper(a) * upper(b);
      }
      std::memcpy(&tiles[C][r][c], &sum, 4);
    }
  }
}

#define TILE_ZERO(N) tile_zero<N>()
#define TILE_LOAD(N, FROM, STRIDE) tile_load<N>(FROM, STRIDE)
#define TILE_STORE(N, TO, STRIDE) tile_store<N>(TO, STRIDE)
#define TILE_PRODUCT(C, A, B) tile_product<C, A, B>()

#else

#define TILE_ZERO(N) _tile_zero(N)
#define TILE_LOAD(N, FROM, STRIDE) _tile_loadd(N, FROM, STRIDE)
#define TILE_STORE(N, TO, STRIDE) _tile_stored(N, TO, STRIDE)
#define TILE_PRODUCT(C, A, B) _tile_dpbf16ps(C, A, B)

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void begin() {
  Config config;
  for (int t = 0; t < 8; ++t) {
    config.bytes[t] = 4 * kTileUnits;
    config.rows[t] = kTileRows;
  }
  // gcc does not see that the instruction reads all of the configuration, and would drop these stores.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void end() { _tile_release(); }

#endif

#define TILE_START(N, TILE)           \
  do {                                \
    if (add) {                        \
      TILE_LOAD(N, TILE, kTileBytes); \
    } else {                          \
      TILE_ZERO(N);                   \
    }                                 \
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
    TILE_LOAD(4, left + 4 * u, stride);
    TILE_LOAD(6, panel + u * kPanel, kTileBytes);
    TILE_PRODUCT(0, 4, 6);
    if constexpr (COLUMNS32) {
      TILE_LOAD(7, panel + u * kPanel + kTileUnits, kTileBytes);
      TILE_PRODUCT(1, 4, 7);
    }
    if constexpr (ROWS32) {
      TILE_LOAD(5, lower + 4 * u, stride);
      TILE_PRODUCT(2, 5, 6);
      if constexpr (COLUMNS32) TILE_PRODUCT(3, 5, 7);
    }
  }
  TILE_STORE(0, tile, kTileBytes);
  if constexpr (COLUMNS32) TILE_STORE(1, tile + kTileUnits, kTileBytes);
  if constexpr (ROWS32) TILE_STORE(2, below, kTileBytes);
  if constexpr (ROWS32 && COLUMNS32) TILE_STORE(3, below + kTileUnits, kTileBytes);
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

END_LEVEL(AmxGemm kAmxGemm = {kNeeds, begin, end, multiply})
