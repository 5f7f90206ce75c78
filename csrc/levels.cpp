#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

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

Gemm with(Gemm table, const ByteGemm& bytes) {
  table.name = bytes.name;
  table.needs |= bytes.needs;
  table.pack_rows = bytes.pack_rows;
  table.multiply = bytes.multiply;
  table.quantize = bytes.quantize;
  table.limits = bytes.limits;
  if (bytes.begin != nullptr) {
    table.begin = bytes.begin;
    table.end = bytes.end;
  }
  return table;
}

// The levels' tables for codes of one kind.
struct OfCodes {
  Gemm avx2, avx_vnni, avx512, avx512_vnni, amx;
};

OfCodes of_codes(ByteGemm ByteGemms::*kind) {
  return {with(kAvx2Gemm, kAvx2Bytes.*kind), with(kAvx2Gemm, kAvxVnniBytes.*kind), with(kAvx512Gemm, kAvx512Bytes.*kind),
          with(kAvx512Gemm, kAvx512VnniBytes.*kind), with(kAvx512Gemm, kAmxBytes.*kind)};
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

// Whether activations that meet codes keep more than 8 bits.
std::atomic<bool>& exact() {
  static std::atomic<bool> on = [] {
    const char* asked = std::getenv("HANDFUL_EXACT_ACTIVATIONS");
    const std::string text = asked == nullptr || *asked == '\0' ? "0" : asked;
    if (text != "0" && text != "1") {
      throw std::runtime_error("HANDFUL_EXACT_ACTIVATIONS = '" + text + "': 0 or 1");
    }
    return text == "1";
  }();
  return on;
}

}  // namespace

Chosen choose(uint32_t features) {
  static const Gemm amx = with(kAvx512Bf16Gemm, kAmxGemm);
  static const OfCodes int8 = of_codes(&ByteGemms::int8), int4 = of_codes(&ByteGemms::int4);
  static const Gemm exact_int8 = with(kAvx512Gemm, kAvx512VnniBytes.exact_int8);
  static const Gemm exact_int4 = with(kAvx512Gemm, kAvx512VnniBytes.exact_int4);
  const auto bytes = [&](const OfCodes& of) {
    return first(features, of.amx, of.avx512_vnni, of.avx512, of.avx_vnni, of.avx2);
  };
  const auto exact = [&](const Gemm& of) { return first(features, amx, of, kAvx512Bf16Gemm, kAvx512Gemm, kAvx2Gemm); };
  return {first(features, kAvx512Gemm, kAvx2Gemm),
          first(features, amx, kAvx512Bf16Gemm, kAvx512Gemm, kAvx2Gemm),
          bytes(int8),
          bytes(int4),
          exact(exact_int8),
          exact(exact_int4),
          first(features, kAvx512VnniBf16Gemv, kAvx512VnniGemv, kAvx512Gemv, kAvxVnniGemv, kAvx2Gemv)};
}

const Gemm& gemm_for(bool bf16) { return *(bf16 ? chosen().bfloat16 : chosen().float32); }

const Gemm& gemm_for(bool bf16, const Matrix& m) {
  if (!bf16 || m.group == 0) return gemm_for(bf16);
  if (m.type == Type::kInt8) return *(m.bytes ? chosen().int8 : chosen().exact_int8);
  return *(m.bytes ? chosen().int4 : chosen().exact_int4);
}

const Gemv& gemv() { return *chosen().gemv; }

bool exact_activations() { return exact(); }

void set_exact_activations(bool on) { exact() = on; }

int64_t gemv_max_tokens(const Matrix& m) {
  return (m.pairs && gemv().pairs) || m.group > 0 ? kGemvMaxTokensPacked : kGemvMaxTokens;
}

}  // namespace handful
