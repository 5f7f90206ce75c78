// GEMM of codes with tokens that are made bytes, by AMX's tiles of int8.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")

constexpr uint32_t kNeeds = kAvx2 | kAvx512 | kAvx512Vnni | kAmxInt8;
constexpr int W = 16;

#include "vectors.inc"

#define VNNI
#include "bytes_avx512.inc"
#include "byte_panels.inc"
#include "tiles.inc"

constexpr int kTileRows = 16, kTileColumns = 16;

// Tile 0 holds sums, 1 a group of rows of the left matrix, 2 a group of the panel's columns. A group's sum is to be
// scaled, so a tile has the depth of a group, which is half of what it could have.
void begin() {
  Tiles tiles;
  tiles.set(0, kTileRows, 4 * kTileColumns);
  tiles.set(1, kTileRows, kGroup);
  tiles.set(2, kQuads, 4 * kTileColumns);
  configure(tiles);
}

// In the left matrix a row of a block is the words of its first group, of the next, and so on, then the groups' scales.
constexpr int kScales = kPieces * kQuads;
static_assert(kScales + kPieces <= kLeftStride && kPieces == W && kQuads == W / 2);

typedef int8_t Bytes __attribute__((vector_size(4 * W)));
typedef uint32_t Quads __attribute__((vector_size(4 * kQuads)));

// Words j of all groups of a row, as signed bytes.
template <Type type>
INLINE void load_codes(U* words, const Block& block) {
#pragma GCC unroll 8
  for (int j = 0; j < (type == Type::kInt8 ? kQuads : kQuads / 2); ++j) {
    const U stored = load_words(block.words + 4 * j * block.pieces, block.pieces);
    if constexpr (type == Type::kInt8) {
      words[j] = stored;
    } else {
      words[j] = bits<U>(bits<Bytes>(stored & 0x0f0f0f0fu) - 8);
      words[j + kQuads / 2] = bits<U>(bits<Bytes>((stored >> 4) & 0x0f0f0f0fu) - 8);
    }
  }
}

// Two rows at a time make a square: their groups are its lanes.
template <Type type>
void pack_rows(uint32_t* left, const Matrix& m, int64_t row, int rows, int64_t k0, int count) {
  for (int r = 0; r < rows; r += 2) {
    const int pair = rows - r < 2 ? 1 : 2;
    U square[W] = {};
    for (int i = 0; i < pair; ++i) {
      const int64_t at = row + r + i;
      if (r + i + kPackAhead < rows) prefetch_codes<type>(m, at + kPackAhead, k0, count);
      const Block block(m, at, k0);
      load_codes<type>(square + i * kQuads, block);
      store(left + (r + i) * kLeftStride + kScales, scales_of(m, at, k0, block.pieces));
    }
    transpose(square);
    for (int i = 0; i < pair; ++i) {
      uint32_t* to = left + (r + i) * kLeftStride;
#pragma GCC unroll 16
      for (int g = 0; g < kPieces; ++g) {
        store(to + g * kQuads, load<Quads>(reinterpret_cast<const char*>(&square[g]) + i * sizeof(Quads)));
      }
    }
  }
}

// 16 rows times 16 columns of a panel. Rows beyond the last are computed from anything that the left block holds there,
// and never read.
void multiply_tile(float* tile, const uint32_t* left, const uint32_t* block, int column, int groups, bool add) {
  F sums[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) sums[r] = add ? load<F>(tile + r * kPanel) : F{};
  const int records = groups + static_cast<int>(block[0]);
  for (int i = 0; i < records; ++i) {
    const int group = i < groups ? i : static_cast<int>(block[1 + i - groups]);
    const uint32_t* record = block + kPanel + i * kByteRecord + column;
    alignas(64) int32_t products[kTileRows][kTileColumns];
    _tile_zero(0);
    _tile_loadd(1, left + group * kQuads, 4 * kLeftStride);
    _tile_loadd(2, record, 4 * kPanel);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, products, 4 * kTileColumns);
    const F scale = load<F>(record + scale_row(false) * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const F both = scale * load<float>(left + r * kLeftStride + kScales + group);
      sums[r] = add_product(sums[r], to_float(load<I>(products[r])), both);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) store(tile + r * kPanel, sums[r]);
}

void multiply(const Product& job) {
  const auto* left = reinterpret_cast<const uint32_t*>(job.left);
  for (int r = 0; r < job.rows; r += kTileRows) {
    for (int c = 0; c < job.columns; c += kTileColumns) {
      const int panel = c / kPanel, at = c % kPanel;
      multiply_tile(job.tiles + (panel * kRows + r) * kPanel + at, left + r * kLeftStride,
                    job.right + panel * job.right_stride, at, (job.units + kGroup - 1) / kGroup, job.add);
    }
  }
}

template <Type type>
constexpr ByteGemm byte_gemm() {
  return {"AMX", kNeeds, pack_rows<type>, multiply, quantize<false, 0>, kByteLimits, begin, release};
}

// Exact tokens meet codes in bfloat16 (gemm_amx.cpp).
END_LEVEL(ByteGemms kAmxBytes = {byte_gemm<Type::kInt8>(), byte_gemm<Type::kInt4>(), {}, {}})
