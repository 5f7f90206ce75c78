// GEMV with 16 lanes, for CPUs that have AVX-512 (F, BW, DQ and VL).
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

constexpr uint32_t kNeeds = kAvx2 | kAvx512;
constexpr int W = 16;

#include "vectors.inc"

typedef int16_t S __attribute__((vector_size(4 * W)));

INLINE I multiply_pairs(I sums, S a, S b) {
  return sums + bits<I>(_mm512_madd_epi16(bits<__m512i>(a), bits<__m512i>(b)));
}

INLINE S signed_bytes(const char* from) { return bits<S>(_mm512_cvtepi8_epi16(load<__m256i>(from))); }
INLINE S unsigned_bytes(const char* from) { return bits<S>(_mm512_cvtepu8_epi16(load<__m256i>(from))); }

#define CODES "gemv_codes_int16.inc"
#include "gemv.inc"

END_LEVEL(Gemv kAvx512Gemv = gemv_table("AVX-512"))
