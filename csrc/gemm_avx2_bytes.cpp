// GEMM of codes with tokens that are made bytes, with 8 lanes, for CPUs that have AVX2, FMA and F16C.
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c")

constexpr uint32_t kNeeds = kAvx2;
constexpr int W = 8;

#include "vectors.inc"
#include "bytes_avx2.inc"
#include "gemm_bytes.inc"

END_LEVEL(ByteGemms kAvx2Bytes = byte_gemms("AVX2"))
