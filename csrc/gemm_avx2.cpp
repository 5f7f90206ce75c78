// GEMM in float32 with 8 lanes, for CPUs that have AVX2, FMA and F16C.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c")

constexpr uint32_t kNeeds = kAvx2;
constexpr int W = 8, ACROSS = 2;

#include "gemm_float32.inc"

END_LEVEL(Gemm kAvx2Gemm = gemm_table("AVX2"))
