// GEMM of codes with tokens that are made bytes, with 16 lanes, for CPUs that have AVX-512 (F, BW, DQ and VL).
#include "levels.h"

BEGIN_LEVEL("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

constexpr uint32_t kNeeds = kAvx2 | kAvx512;
constexpr int W = 16;

#include "vectors.inc"
#include "bytes_avx512.inc"
#include "gemm_bytes.inc"

END_LEVEL(ByteGemms kAvx512Bytes = byte_gemms("AVX-512"))
