// GEMV with 16 lanes, for CPUs that have AVX-512 VNNI and BF16.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")

constexpr uint32_t kNeeds = kAvx2 | kAvx512 | kAvx512Vnni | kAvx512Bf16;
constexpr int W = 16;

#define BF16
#include "vectors.inc"

#define VNNI
#include "bytes_avx512.inc"
#include "gemv.inc"

END_LEVEL(Gemv kAvx512VnniBf16Gemv = gemv_table("AVX-512 VNNI and BF16"))
