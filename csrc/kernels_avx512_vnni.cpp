// The streaming kernels with 16 lanes, for CPUs that have AVX-512 VNNI.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "levels.h"

// gcc 12 warns of its own intrinsics' undefined operands.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace handful {
namespace {

constexpr int W = 16;

#include "vectors.inc"

#define CODES "codes_bytes.inc"
#include "stream.inc"
#include "attend.inc"

}  // namespace

const Stream kAvx512VnniStream = kLoops;

}  // namespace handful

#pragma GCC pop_options
