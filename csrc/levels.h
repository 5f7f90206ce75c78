// The kernels of every level that is compiled in; `kernels()` and `stream()` choose among those that the CPU has.
#pragma once

#include "kernels.h"

namespace handful {

extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
extern const Stream kAvx2Stream, kAvx512Stream, kAvx512VnniStream, kAvx512PairsStream;

Kernels amx_kernels();
Kernels byte_kernels();

}  // namespace handful
