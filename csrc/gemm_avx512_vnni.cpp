// GEMM of codes with tokens that are made bytes, for CPUs that have AVX-512 VNNI; all else is float32's with AVX-512.
//
// VNNI multiplies an unsigned byte by a signed one, four products to an int32 sum. A token's value needs more than a
// byte: with the largest of 32 values as its scale, one byte is off by 0.5 % of a token of normal numbers, and a
// layer's result by 1.2 %. So four neighbouring values share a fifth byte. They stand for
//
//   scale · (q + rest · (1, 2, 4, 8) / 16),   with the bytes q, four of them, and `rest` from -8 to 7
//
// The last bit of `rest` is half a step of the last value. What it adds to the others is known, so that the next bit can
// be half a step of the third value, and so on. Every value is rounded to half a step, for a quarter more products:
//
//   Σ w · value = scale · (Σ w · q + rest · (w0 + 2 w1 + 4 w2 + 8 w3) / 16)
//
// Weights are int8's codes plus 128, or int4's codes as stored times 16, whose bracket is a whole number.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

constexpr uint32_t kNeeds = kAvx2 | kAvx512 | kAvx512Vnni;
constexpr int W = 16;

#include "vectors.inc"

// A group is 32 values. In a panel it is its bytes, the bytes of its rests, a float32 scale, and the numbers that the
// int32 sums begin at, which take the weights' offset of 128 off. In the left matrix, where a group is a piece of a
// block, it is its bytes, the brackets for the rests, and its scale, each of all groups of the block side by side.
constexpr int kGroup = kByteGroup, kQuads = kGroup / 4, kUnits = kQuads + kQuads / 4;
constexpr int kScaleRow = kUnits, kStartRow = kUnits + 1;
constexpr int kOffset = 128;
static_assert((kStartRow + 1) * kPanel == kByteRecord && (kUnits + 1) * kPieces <= kLeftStride);
static_assert(kGroup == kPiece && kByteDepth == kBlock && W == kPieces);

constexpr float kLargest = 123;             // with `rest` a byte's 127
constexpr float kHalfMagic = kMagic / 2;    // the nearest half
constexpr float kLeast = 1e-36f;            // a group whose largest is less is zero: its scale's inverse is no number
constexpr float kLeastPart = 1e-9f;         // of the token's largest
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

INLINE I multiply_bytes(I sums, U unsigned_bytes, U signed_bytes) {
  return bits<I>(_mm512_dpbusd_epi32(bits<__m512i>(sums), bits<__m512i>(unsigned_bytes), bits<__m512i>(signed_bytes)));
}

// By name, so that it is one instruction whatever the shape of the loop.
INLINE F add_product(F sum, F a, F b) {
  return bits<F>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(sum)));
}

INLINE F to_float(I value) { return __builtin_convertvector(value, F); }

// -------------------------------------------------------------------------------------------------------------------
// Weights.

template <Type type>
INLINE void pack_row(uint32_t* left, const Matrix& m, int64_t row, int64_t k0) {
  const Block block(m, row, k0);
  const auto lanes = static_cast<__mmask16>((1 << block.pieces) - 1);
  U rests[kQuads / 4] = {};
  const auto put = [&](int j, U bytes) {
    store(left + j * kPieces, bytes);
    // (1, 2, 4, 8) times them, over 16, less 15 / 16 · 128 and plus the offset.
    const I sums = multiply_bytes(I{}, bytes, U{} + 0x08040201u);
    rests[j / 4] |= (bits<U>(((sums + 8) >> 4) + 8) & 0xffu) << (j % 4 * 8);
  };
#pragma GCC unroll 8
  for (int j = 0; j < (type == Type::kInt8 ? 8 : 4); ++j) {
    const U words = bits<U>(_mm512_maskz_loadu_epi32(lanes, block.words + 4 * j * block.pieces));
    if constexpr (type == Type::kInt8) {
      put(j, words ^ 0x80808080u);
    } else {
      put(j, (words << 4) & 0xf0f0f0f0u);
      put(j + 4, words & 0xf0f0f0f0u);
    }
  }
  for (int u = 0; u < kQuads / 4; ++u) store(left + (kQuads + u) * kPieces, rests[u]);
  const uint16_t* scales = m.scales + row * m.scale_stride + k0 / m.group;
  const U places = U{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} >> (m.group == kPiece ? 0 : 2);
  const int count = m.group == kPiece ? block.pieces : block.pieces / 4;
  const F some = widen(bits<H>(_mm256_maskz_loadu_epi16((1 << count) - 1, scales)));
  const F spread = bits<F>(_mm512_permutexvar_ps(bits<__m512i>(places), bits<__m512>(some)));
  store(left + kUnits * kPieces, spread * (type == Type::kInt4 ? 1.0f / 16 : 1.0f));
}

constexpr int kRowsAhead = 4;  // that are asked for: the CPU's own prefetchers do not know that a row goes on below

void pack_rows(uint32_t* left, const Matrix& m, int64_t row, int rows, int64_t k0, int count) {
  for (int r = 0; r < rows; ++r) {
    if (r + kRowsAhead < rows) {
      const char* ahead = m.row(row + r + kRowsAhead);
      const int64_t first = m.type == Type::kInt8 ? k0 : k0 / 2, bytes = m.type == Type::kInt8 ? count : count / 2;
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(ahead + first + b);
    }
    if (m.type == Type::kInt8) {
      pack_row<Type::kInt8>(left + r * kLeftStride, m, row + r, k0);
    } else {
      pack_row<Type::kInt4>(left + r * kLeftStride, m, row + r, k0);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------------
// Tokens. W lanes of a group at a time.

// Makes `record` of a group's values, and returns the scales. Where the largest is not above `least`: zeros.
INLINE F quantize_group(uint32_t* record, const F (&values)[kGroup], F least) {
  F most = {};
  for (int k = 0; k < kGroup; ++k) {
    const F size = size_of(values[k]);
    most = size > most ? size : most;
  }
  const F inverse = most > least ? kLargest / most : F{};
  I sums = {};
  U rest_bytes[kQuads / 4] = {};
#pragma GCC unroll 8
  for (int j = 0; j < kQuads; ++j) {
    F steps[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) steps[i] = values[4 * j + i] * inverse;
    I rest = {};
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) {
      const F halves = steps[i] - to_float(rest) * (static_cast<float>(1 << i) / 16) + kHalfMagic;
      rest |= (bits<I>(halves) & 1) << (3 - i);
    }
    rest = (rest ^ 8) - 8;
    U unit = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F whole = steps[i] - to_float(rest) * (static_cast<float>(1 << i) / 16) + kMagic;
      unit |= (bits<U>(whole) & 0xffu) << (8 * i);
    }
    store(record + j * kPanel, unit);
    sums = multiply_bytes(sums, U{} + 0x01010101u, unit);
    rest_bytes[j / 4] |= (bits<U>(rest) & 0xffu) << (j % 4 * 8);
  }
#pragma GCC unroll 8
  for (int u = 0; u < kQuads / 4; ++u) {
    store(record + (kQuads + u) * kPanel, rest_bytes[u]);
    sums = multiply_bytes(sums, U{} + 0x01010101u, rest_bytes[u]);
  }
  const F scale = most > least ? most * (1.0f / kLargest) : F{};
  store(record + kScaleRow * kPanel, scale);
  store(record + kStartRow * kPanel, sums * -kOffset);
  return scale;
}

// values -= what `record` stands for.
INLINE void subtract(F (&values)[kGroup], const uint32_t* record, F scale) {
  for (int k = 0; k < kGroup; ++k) {
    const int j = k / 4, i = k % 4;
    const I q = bits<I>(load<U>(record + j * kPanel) << (24 - 8 * i)) >> 24;
    const I rest = bits<I>(load<U>(record + (kQuads + j / 4) * kPanel) << (24 - j % 4 * 8)) >> 24;
    values[k] -= scale * (to_float(q) + to_float(rest) * (static_cast<float>(1 << i) / 16));
  }
}

INLINE void load_group(F (&values)[kGroup], const float* from, int64_t count) {
  for (int64_t k = 0; k < kGroup; ++k) values[k] = k < count ? load<F>(from + k * kPanel) : F{};
}

INLINE bool any(I lanes) { return _mm512_test_epi32_mask(bits<__m512i>(lanes), bits<__m512i>(lanes)) != 0; }

// About how much a group is off, squared: 32 values, each by up to a quarter of a step. In parts of the token's
// largest.
INLINE F noise_of(F scale, F inverse) { return (scale * inverse) * (scale * inverse) * (kGroup / 48.0f); }

// A token that would be off by more than the limit, because few of its values are most of it, has its coarsest groups
// twice: what is left of their values is quantized again.
void quantize(uint32_t* panel, const float* values, int64_t width, float limit) {
  constexpr int kHalves = kPanel / W, kBlock = kByteDepth / kGroup;
  const int64_t groups = (width + kGroup - 1) / kGroup;
  const auto block_of = [&](int64_t g) { return panel + g / kBlock * (kPanel + 2 * kBlock * kByteRecord); };
  const auto record_of = [&](int64_t g) { return block_of(g) + kPanel + g % kBlock * kByteRecord; };
  for (int64_t g = 0; g < groups; g += kBlock) block_of(g)[0] = 0;
  F inverse_of[kHalves], coarse[kHalves];  // the part of its length that a group may be off by
  bool twice = false;
  F group[kGroup];
  for (int h = 0; h < kHalves; ++h) {
    F most = {}, wrong = {};
    for (int64_t k = 0; k < width; ++k) {
      const F size = size_of(load<F>(values + k * kPanel + h * W));
      most = size > most ? size : most;
      wrong += size * 0.0f;
    }
    // Bytes cannot carry a NaN or an infinity: the scale does, and all of the token's results are NaN.
    const auto finite = wrong == 0.0f;
    const F least_of_all = splat(kLeast), part = most * kLeastPart;
    const F least = part > least_of_all ? part : least_of_all;
    const F inverse = most > kLeast ? 1.0f / most : F{};
    F energy = {}, noise = {};
    for (int64_t g = 0; g < groups; ++g) {
      load_group(group, values + g * kGroup * kPanel + h * W, width - g * kGroup);
      uint32_t* record = record_of(g) + h * W;
      const F scale = quantize_group(record, group, least);
      if (any(~finite)) store(record + kScaleRow * kPanel, finite ? scale : splat(kNan));
      for (int k = 0; k < kGroup; ++k) energy += (group[k] * inverse) * (group[k] * inverse);
      noise += noise_of(scale, inverse);
    }
    const F granted = limit * limit * energy;
    const auto too_much = finite & (noise > granted);
    // Groups within an even share stay as they are.
    inverse_of[h] = inverse;
    coarse[h] = too_much ? granted / static_cast<float>(groups) : splat(std::numeric_limits<float>::infinity());
    twice = twice || any(too_much);
  }
  for (int64_t g = 0; twice && g < groups; ++g) {
    const uint32_t* record = record_of(g);
    I chosen[kHalves];
    bool here = false;
    for (int h = 0; h < kHalves; ++h) {
      chosen[h] = noise_of(load<F>(record + kScaleRow * kPanel + h * W), inverse_of[h]) > coarse[h];
      here = here || any(chosen[h]);
    }
    if (!here) continue;
    uint32_t* block = block_of(g);
    const int64_t first = g / kBlock * kBlock, in_block = groups - first < kBlock ? groups - first : kBlock;
    uint32_t* again = block + kPanel + (in_block + block[0]) * kByteRecord;
    block[1 + block[0]++] = static_cast<uint32_t>(g % kBlock);
    for (int h = 0; h < kHalves; ++h) {
      load_group(group, values + g * kGroup * kPanel + h * W, width - g * kGroup);
      subtract(group, record + h * W, load<F>(record + kScaleRow * kPanel + h * W));
      for (F& value : group) value = chosen[h] ? value : F{};
      quantize_group(again + h * W, group, splat(kLeast));
    }
  }
}

// -------------------------------------------------------------------------------------------------------------------
// The product.

template <int ROWS, int VECTORS>
void multiply_rows(float* tile, const uint32_t* left, const uint32_t* block, int groups, bool add) {
  F sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = add ? load<F>(tile + r * kPanel + v * W) : F{};
  }
  const int records = groups + static_cast<int>(block[0]);
  for (int i = 0; i < records; ++i) {
    const uint32_t* weights = left + (i < groups ? i : static_cast<int>(block[1 + i - groups]));
    const uint32_t* record = block + kPanel + i * kByteRecord;
    I dots[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) dots[r][v] = load<I>(record + kStartRow * kPanel + v * W);
    }
#pragma GCC unroll 1
    for (int u = 0; u < kUnits; ++u) {
      U right[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) right[v] = load<U>(record + u * kPanel + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const U value = U{} + weights[r * kLeftStride + u * kPieces];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) dots[r][v] = multiply_bytes(dots[r][v], value, right[v]);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      const F scale = load<F>(record + kScaleRow * kPanel + v * W);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const F both = scale * load<float>(weights + r * kLeftStride + kUnits * kPieces);
        sums[r][v] = add_product(sums[r][v], to_float(dots[r][v]), both);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(tile + r * kPanel + v * W, sums[r][v]);
  }
}

using MultiplyRows = void (*)(float*, const uint32_t*, const uint32_t*, int, bool);

// Sums and products of 12 vectors fit in the registers.
constexpr int kTogether = 12;

template <int VECTORS, int... R>
constexpr auto multiply_table(std::integer_sequence<int, R...>) {
  struct Table {
    MultiplyRows rows[sizeof...(R)];
  };
  return Table{{multiply_rows<R + 1, VECTORS>...}};
}

template <int VECTORS>
void multiply_vectors(float* tile, const uint32_t* left, int rows, const uint32_t* block, int groups, bool add) {
  constexpr int kStep = kTogether / VECTORS;
  static constexpr auto kTable = multiply_table<VECTORS>(std::make_integer_sequence<int, kStep>{});
  for (int r = 0; r < rows; r += kStep) {
    const int some = rows - r < kStep ? rows - r : kStep;
    kTable.rows[some - 1](tile + r * kPanel, left + r * kLeftStride, block, groups, add);
  }
}

void multiply(const Product& job) {
  const auto* left = reinterpret_cast<const uint32_t*>(job.left);
  for (int c = 0; c < job.columns; c += kPanel) {
    float* tile = job.tiles + c / kPanel * kRows * kPanel;
    const auto by = job.columns - c > W ? multiply_vectors<2> : multiply_vectors<1>;
    by(tile, left, job.rows, job.right + c / kPanel * job.right_stride, (job.units + kGroup - 1) / kGroup, job.add);
  }
}

END_LEVEL(VnniGemm kAvx512VnniGemm = {kNeeds, pack_rows, multiply, quantize})
