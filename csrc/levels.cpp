#include "kernels.h"

#include <stdexcept>

#include "isa.h"
#include "levels.h"

namespace handful {
namespace {

const Gemm& amx() {
  static const Gemm all = [] {
    Gemm table = kAvx512Bf16Gemm;
    table.name = "AMX";
    table.needs |= kAmxGemm.needs;
    table.in_place = false;  // a left block may have rows beyond the last one
    table.begin = kAmxGemm.begin;
    table.end = kAmxGemm.end;
    table.multiply = kAmxGemm.multiply;
    return table;
  }();
  return all;
}

const Gemm& bytes() {
  static const Gemm all = [] {
    Gemm table = kAvx512Gemm;
    table.name = "AVX-512 VNNI";
    table.needs |= kAvx512VnniGemm.needs;
    table.pack_rows = kAvx512VnniGemm.pack_rows;
    table.multiply = kAvx512VnniGemm.multiply;
    table.quantize = kAvx512VnniGemm.quantize;
    return table;
  }();
  return all;
}

// The first of the tables, which stand in order of preference, that the features cover.
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
  return {first(features, kAvx512Gemm, kAvx2Gemm),
          first(features, amx(), kAvx512Bf16Gemm, kAvx512Gemm, kAvx2Gemm),
          first(features, amx(), bytes(), kAvx512Bf16Gemm, kAvx512Gemm, kAvx2Gemm),
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
