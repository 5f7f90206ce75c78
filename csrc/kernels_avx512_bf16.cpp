// The kernels with 16 lanes of bfloat16 pairs, for CPUs that have AVX-512 BF16.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "levels.h"

// gcc 12 warns of its own intrinsics' undefined operands.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace handful {
namespace {

constexpr Type kOwn = Type::kBFloat16;
constexpr int W = 16, VALUES = 2, LEFT_ROWS = 6, ACROSS = 4;

#define NARROW
#include "vectors.inc"

INLINE F multiply_add(F tile, U left, U right) {
  return bits<F>(_mm512_dpbf16_ps(bits<__m512>(tile), bits<__m512bh>(left), bits<__m512bh>(right)));
}

template <class HalfF, class HalfU>
INLINE HalfF multiply_add(HalfF tile, HalfU left, HalfU right) {
  return bits<HalfF>(_mm256_dpbf16_ps(bits<__m256>(tile), bits<__m256bh>(left), bits<__m256bh>(right)));
}

// Codes into bfloat16. int8: 32 at a time. int4: a group has 16 numbers in all, which a lookup picks from.
template <Type type>
INLINE int dequantize(char* to, const char* codes, const uint16_t* scales, int group, int count) {
  const int shift = group == 32 ? 5 : 7;
  if constexpr (type == Type::kInt8) {
    const int whole = static_cast<int>(round_up(count, 32));  // the stored row is longer still
    for (int k = 0; k < whole; k += 32) {
      const __m512 scale = _mm512_set1_ps(widen(scales[k >> shift]));
      const __m512i first = _mm512_cvtepi8_epi32(load<__m128i>(codes + k));
      const __m512i second = _mm512_cvtepi8_epi32(load<__m128i>(codes + k + 16));
      const __m512 low = _mm512_mul_ps(_mm512_cvtepi32_ps(first), scale);
      const __m512 high = _mm512_mul_ps(_mm512_cvtepi32_ps(second), scale);
      store(to + 2 * k, _mm512_cvtne2ps_pbh(high, low));
    }
    return whole;
  } else {
    const F numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const auto table = [&](int group_index) {
      const __m256i sixteen = bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(numbers * widen(scales[group_index]))));
      return _mm512_broadcast_i64x4(sixteen);  // twice: the lookup's fifth bit is the other nibble's
    };
    const int whole = static_cast<int>(round_up(count, 64));
    for (int k = 0; k < whole; k += 64) {
      const __m512i both = _mm512_cvtepu8_epi16(load<__m256i>(codes + k / 2));
      const __m512i low = table(k >> shift), high = group == 32 ? table((k >> shift) + 1) : low;
      store(to + 2 * k, _mm512_permutexvar_epi16(both, low));
      store(to + 2 * k + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), high));
    }
    return whole;
  }
}

#include "products.inc"

void nothing() {}

}  // namespace

const Kernels kAvx512Bf16Kernels = {VALUES,       true,        nothing,         nothing,  pack_rows,
                                    pack_columns, pack_tokens, pack_transposed, multiply, activate,
                                    activate_backward, soften, scale_columns, store_transposed, store_rows};

}  // namespace handful

#pragma GCC pop_options
