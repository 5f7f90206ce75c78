#include "gemm.h"

#include <algorithm>

namespace handful {
namespace {

// Multiplies rows where they lie, in depths whose panels stay in the level 2 cache for all rows.
void multiply_in_place(const Gemm& gemm, const Workspace& w, const LeftRows& left, const Right& right, int64_t count,
                       bool add) {
  constexpr int64_t kCached = 512 << 10;
  const int64_t units = count / gemm.values, most = kCached / (right.panels * kPanel * 4);
  const int64_t blocks = (units + most - 1) / most;
  const int64_t depth = (units + blocks * kUnitGrid - 1) / (blocks * kUnitGrid) * kUnitGrid;
  for (int64_t u = 0; u < units; u += depth) {
    const int some = static_cast<int>(units - u < depth ? units - u : depth);
    for (int part = 0; part < left.parts; ++part) {
      const bool last = part + 1 == left.parts;
      const int64_t next = last ? u + depth : u;
      gemm.multiply({w.tiles + part * left.rows * kPanel, left.m.row(left.first[part]) + 4 * u, left.m.stride,
                     left.rows, right.first + u * kPanel, right.stride, right.columns(), some, add || u > 0,
                     next < units ? left.m.row(left.first[last ? 0 : part + 1]) + 4 * next : nullptr});
    }
  }
}

}  // namespace

Workspace& Workspace::mine() {
  struct Owned : Workspace {
    Buffer memory{(int64_t{kRows} * kLeftStride + int64_t{kGroup} * kRows * kPanel) * 4};
    Owned() {
      left = memory.as<uint32_t>();
      tiles = memory.as<float>() + int64_t{kRows} * kLeftStride;
    }
  };
  static thread_local Owned owned;
  return owned;
}

void multiply_matrix(const Gemm& gemm, const Workspace& w, const LeftRows& left, const Right& right, int64_t count,
                     bool add) {
  const Type own = gemm.values == 1 ? Type::kFloat32 : Type::kBFloat16;
  if (gemm.in_place && left.m.type == own && count % (kUnitGrid * gemm.values) == 0) {
    return multiply_in_place(gemm, w, left, right, count, add);
  }
  multiply_block(gemm, w, left.rows * left.parts, right, count, add, [&](uint32_t* to, int64_t k0, int some) {
    for (int part = 0; part < left.parts; ++part) {
      gemm.pack_rows(to + part * left.rows * kLeftStride, left.m, left.first[part], left.rows, k0, some);
    }
  });
}

void fill_with_bias(const Workspace& w, int panels, const Stack& stack, int64_t matrix, int64_t row, int at, int rows) {
  float bias[kRows];
  stack.copy_bias(bias, matrix, row, rows);
  for (int p = 0; p < panels; ++p) {
    for (int r = 0; r < rows; ++r) std::fill_n(w.tile(p) + (at + r) * kPanel, kPanel, bias[r]);
  }
}

void pack_right(const Gemm& gemm, uint32_t* to, const char* const* rows, int count, Type type, int64_t width) {
  if (gemm.quantize == nullptr) return gemm.pack_tokens(to, rows, count, type, width);
  const Buffer buffer(panel_units(width, gemm.values) * kPanel * 4);
  gemm.pack_tokens(buffer.as<uint32_t>(), rows, count, type, width);
  gemm.quantize(to, buffer.as<float>(), width, gemm.limits.input);
}

}  // namespace handful
