// The streaming kernels with 16 lanes, for CPUs that have AVX-512 VNNI and BF16.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")

namespace handful {
namespace {

constexpr uint32_t kNeeds = kAvx2 | kAvx512 | kAvx512Vnni | kAvx512Bf16;

constexpr int W = 16;

#define NARROW
#include "vectors.inc"

// sums + a · b for two neighbouring numbers to each lane.
INLINE F multiply_floats(F sums, U a, U b) {
  return bits<F>(_mm512_dpbf16_ps(bits<__m512>(sums), bits<__m512bh>(a), bits<__m512bh>(b)));
}

#define PAIRS
#define CODES "gemv_codes_bytes.inc"
#include "gemv.inc"
#include "attention_decode.inc"

}  // namespace

constexpr Gemv kAvx512VnniBf16Gemv = loops("AVX-512 VNNI and BF16");

}  // namespace handful

END_LEVEL
