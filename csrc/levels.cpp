#include "kernels.h"

#include <stdexcept>

#include "isa.h"
#include "levels.h"

namespace handful {
namespace {

const Kernels& amx() {
  static const Kernels all = [] {
    Kernels table = kAvx512Bf16Kernels;
    table.name = "AMX";
    table.needs |= kAmxTiles.needs;
    table.in_place = false;  // a left block may have rows beyond the last one
    table.begin = kAmxTiles.begin;
    table.end = kAmxTiles.end;
    table.multiply = kAmxTiles.multiply;
    return table;
  }();
  return all;
}

const Kernels& bytes() {
  static const Kernels all = [] {
    Kernels table = kAvx512Kernels;
    table.name = "AVX-512 VNNI";
    table.needs |= kAvx512VnniBytes.needs;
    table.pack_rows = kAvx512VnniBytes.pack_rows;
    table.multiply = kAvx512VnniBytes.multiply;
    table.quantize = kAvx512VnniBytes.quantize;
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
  return {first(features, kAvx512Kernels, kAvx2Kernels),
          first(features, amx(), kAvx512Bf16Kernels, kAvx512Kernels, kAvx2Kernels),
          first(features, amx(), bytes(), kAvx512Bf16Kernels, kAvx512Kernels, kAvx2Kernels),
          first(features, kAvx512PairsStream, kAvx512VnniStream, kAvx512Stream, kAvx2Stream)};
}

const Kernels& kernels(bool bf16) { return bf16 ? *chosen().bfloat16 : *chosen().float32; }

const Kernels& kernels(bool bf16, Type weights) {
  const bool codes = weights == Type::kInt8 || weights == Type::kInt4;
  return codes && bf16 ? *chosen().codes : kernels(bf16);
}

const Stream& stream() { return *chosen().stream; }

int64_t few(const Matrix& m) { return (m.pairs && stream().pairs) || m.group > 0 ? 16 : 8; }

}  // namespace handful
