// GEMV with 8 lanes, for CPUs that have AVX2, FMA and F16C.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c")

constexpr uint32_t kNeeds = kAvx2;
constexpr int W = 8;

#include "vectors.inc"
#include "bytes_avx2.inc"
#include "gemv.inc"

END_LEVEL(Gemv kAvx2Gemv = gemv_table("AVX2"))
