// GEMV with 8 lanes, for CPUs that have AVX-VNNI.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avxvnni")

constexpr uint32_t kNeeds = kAvx2 | kAvxVnni;
constexpr int W = 8;

#include "vectors.inc"

#define VNNI
#include "bytes_avx2.inc"
#include "gemv.inc"

END_LEVEL(Gemv kAvxVnniGemv = gemv_table("AVX-VNNI"))
