#include "kernels.h"

#include "isa.h"
#include "levels.h"

namespace handful {

const Kernels& kernels(bool bf16) {
  static const Kernels amx = amx_kernels();
  if (bf16 && has(kAmxBf16)) return amx;
  if (bf16 && has(kAvx512Bf16)) return kAvx512Bf16Kernels;
  return has(kAvx512) ? kAvx512Kernels : kAvx2Kernels;
}

const Stream& stream() {
  if (has(kAvx512Vnni) && has(kAvx512Bf16)) return kAvx512PairsStream;
  if (has(kAvx512Vnni)) return kAvx512VnniStream;
  return has(kAvx512) ? kAvx512Stream : kAvx2Stream;
}

}  // namespace handful
