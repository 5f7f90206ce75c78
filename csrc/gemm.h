// GEMM: blocks of a matrix's rows, packed or where they lie, times panels of many tokens give tiles (kernels.h).
#pragma once

#include "runtime.h"
#include "weights.h"

namespace handful {

// What a block of kRows rows and a panel cost for each value of their sum, in nanoseconds: a guess for `each`.
constexpr double kItemCost = 0.01 * kRows * kPanel;

// A thread's left block and tiles.
struct Workspace {
  static constexpr int kGroup = 16;  // panels that meet a left block while it is in the cache

  uint32_t* left;
  float* tiles;

  float* tile(int panel) const { return tiles + panel * kRows * kPanel; }

  static Workspace& mine();
};

// The right matrix of a product: panels `stride` units apart, of which the last holds `last_columns` columns.
struct Right {
  const uint32_t* first;
  int64_t stride;
  int panels;
  int last_columns;

  int columns(int panel) const { return panel + 1 == panels ? last_columns : kPanel; }
  int columns() const { return (panels - 1) * kPanel + last_columns; }
};

// The left matrix of a product: `rows` rows of a matrix from each of `first` on.
struct LeftRows {
  Matrix m;
  int rows, parts;
  int64_t first[2];
};

// Units of a panel of `width` values.
inline int64_t panel_units(int64_t width, int values) {
  const int64_t units = (width + values - 1) / values;
  return (units + kUnitGrid - 1) / kUnitGrid * kUnitGrid;
}

// Values of the sum that are multiplied at once.
inline int64_t depth_of(const Gemm& gemm) {
  return gemm.quantize == nullptr ? int64_t{kDepth} * gemm.values : kByteDepth;
}

// Units of all columns of a panel of `width` values, as `multiply` takes it. For a multiple of the depth it is where
// value `width` begins.
inline int64_t right_units(const Gemm& gemm, int64_t width) {
  if (gemm.quantize == nullptr) return panel_units(width, gemm.values) * kPanel;
  return (width + kByteDepth - 1) / kByteDepth * kPanel + (width + kByteGroup - 1) / kByteGroup * 2 * kByteRecord;
}

// tiles (+)= left · right over `count` values of the sum; pack(left, k0, some) packs the left matrix's values k0 to
// k0 + some. Called between begin and end.
template <class Pack>
void multiply_block(const Gemm& gemm, const Workspace& w, int rows, const Right& right, int64_t count, bool add,
                    const Pack& pack) {
  const int64_t depth = depth_of(gemm);
  for (int64_t k0 = 0; k0 < count; k0 += depth) {
    const int some = static_cast<int>(count - k0 < depth ? count - k0 : depth);
    pack(w.left, k0, some);
    gemm.multiply({w.tiles, reinterpret_cast<const char*>(w.left), kLeftStride * 4, rows,
                   right.first + right_units(gemm, k0), right.stride, right.columns(),
                   (some + gemm.values - 1) / gemm.values, add || k0 > 0});
  }
}

// The same for rows of a matrix, which are in the tiles in that order.
void multiply_matrix(const Gemm& gemm, const Workspace& w, const LeftRows& left, const Right& right, int64_t count,
                     bool add);

// Fills rows `at` to `at + rows` of all tiles with the biases `row` to `row + rows` of one matrix.
void fill_with_bias(const Workspace& w, int panels, const Stack& stack, int64_t matrix, int64_t row, int at, int rows);

// Makes a panel of `count` rows of `width` values.
void pack_right(const Gemm& gemm, uint32_t* to, const char* const* rows, int count, Type type, int64_t width);

}  // namespace handful
