// The kernels with 8 lanes, for CPUs that have AVX2, FMA and F16C.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c")

namespace handful {
namespace {

constexpr uint32_t kNeeds = kAvx2;

constexpr Type kOwn = Type::kFloat32;
constexpr int W = 8, VALUES = 1, LEFT_ROWS = 6, ACROSS = 2;

#include "vectors.inc"

template <class Sums, class Units>
INLINE Sums multiply_add(Sums tile, Units left, Units right) {
  return tile + bits<Sums>(left) * bits<Sums>(right);
}

#include "gemm_float32.inc"
#include "gemm.inc"

typedef int16_t S __attribute__((vector_size(4 * W)));

INLINE I multiply_pairs(I sums, S a, S b) {
  return sums + bits<I>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
}

INLINE S signed_bytes(const char* from) { return bits<S>(_mm256_cvtepi8_epi16(load<__m128i>(from))); }
INLINE S unsigned_bytes(const char* from) { return bits<S>(_mm256_cvtepu8_epi16(load<__m128i>(from))); }

#define CODES "gemv_codes_int16.inc"
#include "gemv.inc"
#include "attention_decode.inc"

void nothing() {}

}  // namespace

constexpr Gemm kAvx2Gemm = {"AVX2", kNeeds, VALUES, true, nothing, nothing,
                                  pack_rows, pack_columns, pack_tokens, pack_transposed, multiply,
                                  activate, activate_backward, online_softmax, scale_columns,
                                  store_transposed, store_rows};
constexpr Gemv kAvx2Gemv = loops("AVX2");

}  // namespace handful

END_LEVEL
