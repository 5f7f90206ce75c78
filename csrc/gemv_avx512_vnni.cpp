// GEMV with 16 lanes, for CPUs that have AVX-512 VNNI.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

constexpr uint32_t kNeeds = kAvx2 | kAvx512 | kAvx512Vnni;
constexpr int W = 16;

#include "vectors.inc"

#define VNNI
#include "bytes_avx512.inc"
#include "gemv.inc"

END_LEVEL(Gemv kAvx512VnniGemv = gemv_table("AVX-512 VNNI"))
