// Memory and threads of one operation.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels.h"

namespace handful {

// Scratch memory, 64-byte aligned and not cleared. Freed blocks are kept for the next operation, up to a limit in all,
// because the system clears every fresh page, which costs more than filling it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Asks for huge pages in a large block that is about to be written for the first time: the system clears 2 MiB at once
// and not 4 KiB at each of 512 faults.
void use_huge_pages(void* data, int64_t bytes);

// A thread's left block and tiles.
struct Workspace {
  static constexpr int kGroup = 16;  // panels that meet a left block while it is in the cache

  uint32_t* left;
  float* tiles;
  char* row_pointers[kRows];

  float* tile(int panel) const { return tiles + panel * kRows * kPanel; }

  static Workspace& mine();
};

// Calls work(i) for every i below `items`, on torch's threads, each taking the next that is left. What an item writes
// must not depend on the others. `cost`: about how many nanoseconds one takes.
template <class Work>
void each(int64_t items, double cost, const Work& work) {
  constexpr double kWorthAThread = 20e3;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || items <= 1 || static_cast<double>(items) * cost < kWorthAThread) {
    for (int64_t i = 0; i < items; ++i) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < items ? threads : items, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < items; i = next++) work(i);
  });
}

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

// Units of all columns of a panel of `width` values, as `multiply` takes it: where value `width` begins, for a multiple
// of the depth.
inline int64_t right_units(const Gemm& gemm, int64_t width) {
  if (gemm.quantize == nullptr) return panel_units(width, gemm.values) * kPanel;
  return (width + kByteDepth - 1) / kByteDepth * kPanel + (width + kByteGroup - 1) / kByteGroup * 2 * kByteRecord;
}

// tiles (+)= left · right over `count` values of the sum; pack(left, k0, some) brings the left matrix's values k0 to
// k0 + some. Between begin and end.
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

// The same for rows of a matrix, in the order in which they are in the tiles.
void multiply_matrix(const Gemm& gemm, const Workspace& w, const LeftRows& left, const Right& right, int64_t count,
                     bool add);

}  // namespace handful
