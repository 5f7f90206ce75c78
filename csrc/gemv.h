// GEMV: matrices times few vectors, each weight read once from memory.
#pragma once

#include <algorithm>

#include "runtime.h"
#include "weights.h"

namespace handful {

// Vectors in the form in which they meet the rows of a matrix like `m`.
class Prepared {
 public:
  // `limit`: what they may be off by where they are rounded to 8 bits.
  Prepared(int64_t count, int64_t width, const Matrix& m, float limit = 0)
      : m_(m), width_(width), limit_(limit), bytes_((gemv().prepared_bytes(width, m) + 63) / 64 * 64), memory_(count * bytes_) {}

  char* row(int64_t i) const { return memory_.as<char>() + i * bytes_; }
  void fill(int64_t i, const char* x, Type type) const;
  void fill(int64_t i, const float* x) const { gemv().prepare(row(i), x, width_, m_, limit_); }

 private:
  Matrix m_;
  int64_t width_;
  float limit_;
  int64_t bytes_;
  Buffer memory_;
};

// Rows of one matrix, and the vectors `first` to `first + count` that meet them.
struct GemvItem {
  int matrix, count;
  int64_t first, row, rows;
};

// Room for the items of most calls: about 32, of which the last are cut once more.
constexpr size_t kItems = 64;

// Cuts a matrix into items for the threads; `matrices` like it are read together.
void add_gemv_items(std::vector<GemvItem>& items, const Stack& stack, int64_t matrices, int64_t matrix, int64_t first,
                    int count);

// Cuts the last items into short ones, so that the threads end together.
void taper(std::vector<GemvItem>& items);

// out(n)[row] = stack[matrix][row] · vector(n) + bias; out(n) are `stride` floats apart.
template <class Vector, class Out>
void run_gemv_item(const Stack& stack, const GemvItem& item, const Vector& vector, const Out& out, int64_t stride) {
  Some<const char*> vectors(item.count);
  for (int v = 0; v < item.count; ++v) vectors[v] = vector(item.first + v);
  float* to = out(item.first) + item.row;
  gemv().multiply(to, stride, stack[item.matrix], item.row, item.rows, vectors.data(), item.count, stack.width);
  if (stack.bias == nullptr) return;
  const Buffer buffer(item.rows * 4);
  float* bias = buffer.as<float>();
  stack.copy_bias(bias, item.matrix, item.row, item.rows);
  for (int v = 0; v < item.count; ++v) {
    for (int64_t r = 0; r < item.rows; ++r) to[v * stride + r] += bias[r];
  }
}

// The cost of an item like the given one, for `each`: a core reads some 12 GB/s.
inline double gemv_cost(const Stack& stack, const GemvItem& item) {
  return 0.08 * static_cast<double>(item.rows * stack.first.stride);
}

template <class Vector, class Out>
void run_gemv_items(const Stack& stack, std::vector<GemvItem>& items, const Vector& vector, const Out& out,
                    int64_t stride) {
  taper(items);
  const double cost = items.empty() ? 0 : gemv_cost(stack, items[0]);
  each(static_cast<int64_t>(items.size()), cost,
       [&](int64_t i) { run_gemv_item(stack, items[i], vector, out, stride); });
}

}  // namespace handful
