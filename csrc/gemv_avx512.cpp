// GEMV with 16 lanes, for CPUs that have AVX-512 (F, BW, DQ and VL).
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

constexpr uint32_t kNeeds = kAvx2 | kAvx512;
constexpr int W = 16;

#include "vectors.inc"
#include "bytes_avx512.inc"
#include "gemv.inc"

END_LEVEL(Gemv kAvx512Gemv = gemv_table("AVX-512"))
