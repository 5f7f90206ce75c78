// GEMM of codes with tokens that are made bytes, with 8 lanes, for CPUs that have AVX-VNNI.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avxvnni")

constexpr uint32_t kNeeds = kAvx2 | kAvxVnni;
constexpr int W = 8;

#include "vectors.inc"

#define VNNI
#include "bytes_avx2.inc"
#include "gemm_bytes.inc"

END_LEVEL(ByteGemms kAvxVnniBytes = byte_gemms("AVX-VNNI"))
