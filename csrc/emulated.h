// Instructions that a CPU lacks, by those of AVX2: a build for tests alone, which proves the levels above it on any CPU.
//
//   HANDFUL_EMULATE_AVX512     AVX-512 with VNNI and BF16
//   HANDFUL_EMULATE_AVX_VNNI   the product of AVX-VNNI
//   HANDFUL_EMULATE_AMX        AMX's tiles
//
// A macro takes the place of each intrinsic that the levels use. Results are those of Intel's description of the
// instruction; where it leaves the order of a sum open, one order. Included by levels.h alone.
#pragma once

PUSH_TARGET("avx2,fma,f16c")

namespace handful {
namespace {
namespace emulated {

#define EMULATED inline __attribute__((always_inline))

template <class T, int BYTES>
struct Vector {
  typedef T Of __attribute__((vector_size(BYTES)));
};
template <class T, int BYTES>
using Lanes = typename Vector<T, BYTES>::Of;

template <class To, class From>
EMULATED To as(From value) {
  return __builtin_bit_cast(To, value);
}

// sums + the four products of unsigned bytes and signed ones in each lane.
template <class V>
EMULATED V dpbusd(V sums, V unsigned_bytes, V signed_bytes) {
  using U = Lanes<uint32_t, sizeof(V)>;
  using I = Lanes<int32_t, sizeof(V)>;
  const U a = as<U>(unsigned_bytes), b = as<U>(signed_bytes);
  I total = as<I>(sums);
  for (int byte = 0; byte < 4; ++byte) total += as<I>((a >> (8 * byte)) & 0xffu) * (as<I>(b << (24 - 8 * byte)) >> 24);
  return as<V>(total);
}

// A bfloat16's number below 2^-126 is zero, in and out.
template <class U>
EMULATED U flushed(U bits) {
  return (bits & 0x7f800000u) == 0u ? bits & 0x80000000u : bits;
}

// In the upper half of each lane, rounded to nearest even; a NaN is a quiet one.
template <class U>
EMULATED U rounded(U bits) {
  const U kept = flushed(bits), up = (kept + 0x7fffu + ((kept >> 16) & 1u)) & 0xffff0000u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits | 0x00400000u) & 0xffff0000u : up;
}

template <class V, class Pairs>
EMULATED V dpbf16(V sums, Pairs first, Pairs second) {
  using U = Lanes<uint32_t, sizeof(V)>;
  const U a = as<U>(first), b = as<U>(second);
  const auto number = [](U bits) __attribute__((always_inline)) { return as<V>(flushed(bits)); };
  const V odd = as<V>(flushed(as<U>(sums + number(a & 0xffff0000u) * number(b & 0xffff0000u))));
  return as<V>(flushed(as<U>(odd + number(a << 16) * number(b << 16))));
}

#ifdef HANDFUL_EMULATE_AVX_VNNI
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd<__m256i>
#endif

#ifdef HANDFUL_EMULATE_AVX512

typedef Lanes<uint16_t, 32> U16;
typedef Lanes<uint32_t, 64> U32;
typedef Lanes<int32_t, 64> I32;
typedef Lanes<int8_t, 64> I8;

// Half h of a vector.
template <class HALF, int h, class V>
EMULATED HALF half_of(V value) {
  constexpr int kWords = sizeof(HALF) / 4, kFirst = h * kWords;
  const auto words = as<Lanes<uint32_t, sizeof(V)>>(value);
  if constexpr (kWords == 8) {
    return as<HALF>(__builtin_shufflevector(words, words, kFirst, kFirst + 1, kFirst + 2, kFirst + 3, kFirst + 4,
                                            kFirst + 5, kFirst + 6, kFirst + 7));
  } else {
    return as<HALF>(__builtin_shufflevector(words, words, kFirst, kFirst + 1, kFirst + 2, kFirst + 3));
  }
}

template <class V, class HALF>
EMULATED V whole(HALF low, HALF high) {
  return as<V>(__builtin_shufflevector(as<Lanes<uint32_t, 32>>(low), as<Lanes<uint32_t, 32>>(high), 0, 1, 2, 3, 4, 5, 6,
                                       7, 8, 9, 10, 11, 12, 13, 14, 15));
}

EMULATED __m512i maddubs(__m512i a, __m512i b) {
  return whole<__m512i>(_mm256_maddubs_epi16(half_of<__m256i, 0>(a), half_of<__m256i, 0>(b)),
                        _mm256_maddubs_epi16(half_of<__m256i, 1>(a), half_of<__m256i, 1>(b)));
}
EMULATED __m512i madd(__m512i a, __m512i b) {
  return whole<__m512i>(_mm256_madd_epi16(half_of<__m256i, 0>(a), half_of<__m256i, 0>(b)),
                        _mm256_madd_epi16(half_of<__m256i, 1>(a), half_of<__m256i, 1>(b)));
}
EMULATED __m512i abs8(__m512i a) {
  return whole<__m512i>(_mm256_abs_epi8(half_of<__m256i, 0>(a)), _mm256_abs_epi8(half_of<__m256i, 1>(a)));
}
EMULATED __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return whole<__m512>(_mm256_fmadd_ps(half_of<__m256, 0>(a), half_of<__m256, 0>(b), half_of<__m256, 0>(c)),
                       _mm256_fmadd_ps(half_of<__m256, 1>(a), half_of<__m256, 1>(b), half_of<__m256, 1>(c)));
}
EMULATED __m512i widen_u16(__m256i a) {
  return whole<__m512i>(_mm256_cvtepu16_epi32(half_of<__m128i, 0>(a)), _mm256_cvtepu16_epi32(half_of<__m128i, 1>(a)));
}
EMULATED __m512i widen_i8(__m128i a) {
  return whole<__m512i>(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
EMULATED __m512 to_float(__m512i a) { return __builtin_convertvector(as<I32>(a), __m512); }

EMULATED __m512i maskz_load(unsigned mask, const void* from) {
  U32 to = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(reinterpret_cast<char*>(&to) + 4 * i, static_cast<const char*>(from) + 4 * i, 4);
  }
  return as<__m512i>(to);
}

EMULATED unsigned test(__m512i a, __m512i b) {
  const U32 both = as<U32>(a) & as<U32>(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (both[i] != 0) << i;
  return mask;
}

// A mask of bytes is 64 bytes, of ones where it is set.
EMULATED I8 signs8(__m512i a) { return as<I8>(a) < 0; }
EMULATED __m512i mask_sub8(__m512i other, I8 mask, __m512i a, __m512i b) {
  return as<__m512i>(mask ? as<I8>(a) - as<I8>(b) : as<I8>(other));
}

EMULATED __m256bh to_bfloat16(__m512 a) {
  return as<__m256bh>(__builtin_convertvector(rounded(as<U32>(a)) >> 16, U16));
}
EMULATED __m512bh to_bfloat16(__m512 upper, __m512 lower) {
  return whole<__m512bh>(to_bfloat16(lower), to_bfloat16(upper));
}

template <class V>
EMULATED V pick16(V places, V values) {
  using U = Lanes<uint16_t, sizeof(V)>;
  const U from = as<U>(values), at = as<U>(places);
  U to;
  for (unsigned i = 0; i < sizeof(V) / 2; ++i) to[i] = from[at[i] % (sizeof(V) / 2)];
  return as<V>(to);
}

#define _mm512_abs_epi8 emulated::abs8
#define _mm512_cvtepi32_ps emulated::to_float
#define _mm512_cvtepi8_epi32 emulated::widen_i8
#define _mm512_cvtepu16_epi32 emulated::widen_u16
#define _mm512_cvtne2ps_pbh emulated::to_bfloat16
#define _mm512_cvtneps_pbh emulated::to_bfloat16
#define _mm256_dpbf16_ps emulated::dpbf16<__m256>
#define _mm512_dpbf16_ps emulated::dpbf16<__m512>
#define _mm512_dpbusd_epi32 emulated::dpbusd<__m512i>
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_madd_epi16 emulated::madd
#define _mm512_maddubs_epi16 emulated::maddubs
#define _mm512_mask_sub_epi8 emulated::mask_sub8
#define _mm512_maskz_loadu_epi32 emulated::maskz_load
#define _mm512_movepi8_mask emulated::signs8
#define _mm512_mul_ps(A, B) ((A) * (B))
#define _mm256_permutexvar_epi16 emulated::pick16<__m256i>
#define _mm512_permutexvar_epi16 emulated::pick16<__m512i>
#define _mm512_set1_epi16(X) emulated::as<__m512i>(emulated::Lanes<int16_t, 64>{} + static_cast<int16_t>(X))
#define _mm512_set1_ps(X) (__m512{} + (X))
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_slli_epi32(X, N) emulated::as<__m512i>(emulated::as<emulated::U32>(X) << (N))
#define _mm512_test_epi32_mask emulated::test

#endif

#ifdef HANDFUL_EMULATE_AMX

// As configured: 16 rows of 64 bytes, whose last ones some tiles may lack.
struct Tiles {
  uint32_t of[8][16][16];
  uint8_t rows[8];
  uint16_t bytes[8];
  bool configured;
};
thread_local Tiles tiles;

EMULATED void tile_loadconfig(const void* config) {
  const char* from = static_cast<const char*>(config);
  if (from[0] != 1) __builtin_trap();
  std::memcpy(tiles.bytes, from + 16, sizeof tiles.bytes);
  std::memcpy(tiles.rows, from + 48, sizeof tiles.rows);
  std::memset(tiles.of, 0, sizeof tiles.of);
  tiles.configured = true;
}

// The instructions trap where a tile is not configured, and products where the sizes do not fit each other.
EMULATED void expect(bool fits) {
  if (!tiles.configured || !fits) __builtin_trap();
}

EMULATED void tile_zero(int t) {
  expect(tiles.rows[t] > 0);
  std::memset(tiles.of[t], 0, sizeof tiles.of[t]);
}

EMULATED void tile_load(int t, const void* from, int64_t stride) {
  tile_zero(t);
  for (int r = 0; r < tiles.rows[t]; ++r) {
    std::memcpy(tiles.of[t][r], static_cast<const char*>(from) + r * stride, tiles.bytes[t]);
  }
}

EMULATED void tile_store(int t, void* to, int64_t stride) {
  expect(tiles.rows[t] > 0);
  for (int r = 0; r < tiles.rows[t]; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles.of[t][r], tiles.bytes[t]);
  }
}

// c + a · b, where `add` adds the products of two units to a sum's bits.
template <class Add>
EMULATED void tile_product(int c, int a, int b, const Add& add) {
  expect(tiles.rows[c] == tiles.rows[a] && tiles.bytes[c] == tiles.bytes[b] && tiles.bytes[a] == 4 * tiles.rows[b]);
  for (int r = 0; r < tiles.rows[c]; ++r) {
    for (int j = 0; j < tiles.bytes[c] / 4; ++j) {
      for (int u = 0; u < tiles.rows[b]; ++u) {
        tiles.of[c][r][j] = add(tiles.of[c][r][j], tiles.of[a][r][u], tiles.of[b][u][j]);
      }
    }
  }
}

EMULATED void tile_dpbf16(int c, int a, int b) {
  tile_product(c, a, b, [](uint32_t sum, uint32_t left, uint32_t right) {
    float total = as<float>(sum);
    total += as<float>(flushed(left << 16)) * as<float>(flushed(right << 16));
    total += as<float>(flushed(left & 0xffff0000u)) * as<float>(flushed(right & 0xffff0000u));
    return flushed(as<uint32_t>(total));
  });
}

EMULATED void tile_dpbssd(int c, int a, int b) {
  tile_product(c, a, b, [](uint32_t sum, uint32_t left, uint32_t right) {
    for (int byte = 0; byte < 4; ++byte) {
      sum += static_cast<uint32_t>(static_cast<int8_t>(left >> (8 * byte)) * static_cast<int8_t>(right >> (8 * byte)));
    }
    return sum;
  });
}

#undef _tile_zero  // gcc's are macros, too
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release() (emulated::tiles.configured = false)
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_load
#define _tile_stored emulated::tile_store
#define _tile_dpbf16ps emulated::tile_dpbf16
#define _tile_dpbssd emulated::tile_dpbssd

#endif

#undef EMULATED

}  // namespace emulated
}  // namespace
}  // namespace handful

POP_TARGET
