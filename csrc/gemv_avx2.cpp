// GEMV with 8 lanes, for CPUs that have AVX2, FMA and F16C.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c")

constexpr uint32_t kNeeds = kAvx2;
constexpr int W = 8;

#include "vectors.inc"

typedef int16_t S __attribute__((vector_size(4 * W)));

INLINE I multiply_pairs(I sums, S a, S b) {
  return sums + bits<I>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
}

INLINE S signed_bytes(const char* from) { return bits<S>(_mm256_cvtepi8_epi16(load<__m128i>(from))); }
INLINE S unsigned_bytes(const char* from) { return bits<S>(_mm256_cvtepu8_epi16(load<__m128i>(from))); }

#define CODES "gemv_codes_int16.inc"
#include "gemv.inc"

END_LEVEL(Gemv kAvx2Gemv = gemv_table("AVX2"))
