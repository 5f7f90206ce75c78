// GEMM in pairs of bfloat16 with 16 lanes, for CPUs that have AVX-512 BF16.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

constexpr uint32_t kNeeds = kAvx2 | kAvx512 | kAvx512Bf16;
constexpr Type kOwn = Type::kBFloat16;
constexpr int W = 16, VALUES = 2, LEFT_ROWS = 6, ACROSS = 4;

#define BF16
#include "vectors.inc"

// Codes into bfloat16. A group has 16 numbers in all at 4 bits, which a lookup picks from.
template <Type type>
INLINE int dequantize(char* to, const Matrix& m, int64_t row, int64_t k0, int count) {
  const uint16_t* scales = m.scales + row * m.scale_stride;
  const int whole = static_cast<int>(round_up(count, kPiece));  // the stored row is longer still
  for (int k = 0; k < whole; k += kPiece) {
    const int64_t column = k0 + k;
    const Block block(m, row, column / kBlock * kBlock);
    const char* words = block.words + column % kBlock / kPiece * 4;
    const float scale = widen(scales[column / m.group]);
    const __m256i places =
        _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(block.pieces));
    if constexpr (type == Type::kInt8) {
      const __m256i codes = _mm256_i32gather_epi32(reinterpret_cast<const int*>(words), places, 4);
      const __m512i first = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes));
      const __m512i second = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1));
      const __m512 low = _mm512_mul_ps(_mm512_cvtepi32_ps(first), _mm512_set1_ps(scale));
      const __m512 high = _mm512_mul_ps(_mm512_cvtepi32_ps(second), _mm512_set1_ps(scale));
      store(to + 2 * k, _mm512_cvtne2ps_pbh(high, low));
    } else {
      const __m128i codes = _mm_i32gather_epi32(reinterpret_cast<const int*>(words), _mm256_castsi256_si128(places), 4);
      const F numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
      const __m256i sixteen = bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(numbers * scale)));
      const __m256i low = _mm256_cvtepu8_epi16(codes), high = _mm256_srli_epi16(low, 4);  // a lookup sees four bits
      store(to + 2 * k, _mm256_permutexvar_epi16(low, sixteen));
      store(to + 2 * k + 32, _mm256_permutexvar_epi16(high, sixteen));
    }
  }
  return whole;
}

#include "gemm.inc"

END_LEVEL(Gemm kAvx512Bf16Gemm = gemm_table("AVX-512 BF16"))
