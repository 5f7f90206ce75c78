// The kernels with 16 lanes, for CPUs that have AVX-512 (F, BW, DQ and VL).
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

namespace handful {
namespace {

constexpr uint32_t kNeeds = kAvx2 | kAvx512;

constexpr Type kOwn = Type::kFloat32;
constexpr int W = 16, VALUES = 1, LEFT_ROWS = 6, ACROSS = 4;

#include "vectors.inc"

template <class Sums, class Units>
INLINE Sums multiply_add(Sums tile, Units left, Units right) {
  return tile + bits<Sums>(left) * bits<Sums>(right);
}

#include "gemm_float32.inc"
#include "gemm.inc"

typedef int16_t S __attribute__((vector_size(4 * W)));

INLINE I multiply_pairs(I sums, S a, S b) {
  return sums + bits<I>(_mm512_madd_epi16(bits<__m512i>(a), bits<__m512i>(b)));
}

INLINE S signed_bytes(const char* from) { return bits<S>(_mm512_cvtepi8_epi16(load<__m256i>(from))); }
INLINE S unsigned_bytes(const char* from) { return bits<S>(_mm512_cvtepu8_epi16(load<__m256i>(from))); }

#define CODES "gemv_codes_int16.inc"
#include "gemv.inc"
#include "attention_decode.inc"

void nothing() {}

}  // namespace

constexpr Gemm kAvx512Gemm = {"AVX-512", kNeeds, VALUES, true, nothing, nothing,
                                  pack_rows, pack_columns, pack_tokens, pack_transposed, multiply,
                                  activate, activate_backward, online_softmax, scale_columns,
                                  store_transposed, store_rows};
constexpr Gemv kAvx512Gemv = loops("AVX-512");

}  // namespace handful

END_LEVEL
