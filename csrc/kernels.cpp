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

const Kernels& kernels(bool bf16, Type weights) {
  static const Kernels bytes = byte_kernels();
  const bool codes = weights == Type::kInt8 || weights == Type::kInt4;
  // AMX multiplies bfloat16 more quickly yet.
  return codes && bf16 && has(kAvx512Vnni) && !has(kAmxBf16) ? bytes : kernels(bf16);
}

const Stream& stream() {
  if (has(kAvx512Vnni) && has(kAvx512Bf16)) return kAvx512PairsStream;
  if (has(kAvx512Vnni)) return kAvx512VnniStream;
  return has(kAvx512) ? kAvx512Stream : kAvx2Stream;
}

int64_t few(const Matrix& m) {
  const bool pairs = m.pairs && has(kAvx512Vnni) && has(kAvx512Bf16);
  return pairs || m.group > 0 ? 16 : 8;
}

}  // namespace handful
