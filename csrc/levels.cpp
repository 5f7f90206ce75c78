#include "kernels.h"

#include <stdexcept>

#include "isa.h"
#include "levels.h"

namespace handful {
namespace {

// Tables that differ from another in part.
Gemm with(Gemm table, const AmxGemm& amx) {
  table.name = "AMX";
  table.needs |= amx.needs;
  table.in_place = false;  // a left block may have rows beyond the last one
  table.begin = amx.begin;
  table.end = amx.end;
  table.multiply = amx.multiply;
  return table;
}

Gemm with(Gemm table, const VnniGemm& bytes) {
  table.name = "AVX-512 VNNI";
  table.needs |= bytes.needs;
  table.pack_rows = bytes.pack_rows;
  table.multiply = bytes.multiply;
  table.quantize = bytes.quantize;
  return table;
}

// The first table, in order of preference, whose needs the features cover.
template <class Table, class... Tables>
const Table* first(uint32_t features, const Table& best, const Tables&... others) {
  if (covers(features, best.needs)) return &best;
  if constexpr (sizeof...(others) > 0) return first(features, others...);
  throw std::runtime_error("there are no kernels for this CPU, or HANDFUL_ISA switched them off");
}

const Chosen& chosen() {
  static const Chosen all = choose(features());
  return all;
}

}  // namespace

Chosen choose(uint32_t features) {
  static const Gemm amx = with(kAvx512Bf16Gemm, kAmxGemm), bytes = with(kAvx512Gemm, kAvx512VnniGemm);
  return {first(features, kAvx512Gemm, kAvx2Gemm),
          first(features, amx, kAvx512Bf16Gemm, kAvx512Gemm, kAvx2Gemm),
          first(features, amx, bytes, kAvx512Bf16Gemm, kAvx512Gemm, kAvx2Gemm),
          first(features, kAvx512VnniBf16Gemv, kAvx512VnniGemv, kAvx512Gemv, kAvx2Gemv)};
}

const Gemm& gemm_for(bool bf16, Type weights) {
  const bool codes = weights == Type::kInt8 || weights == Type::kInt4;
  return *(!bf16 ? chosen().float32 : codes ? chosen().codes : chosen().bfloat16);
}

const Gemv& gemv() { return *chosen().gemv; }

int64_t gemv_max_tokens(const Matrix& m) {
  return (m.pairs && gemv().pairs) || m.group > 0 ? kGemvMaxTokensPacked : kGemvMaxTokens;
}

}  // namespace handful
