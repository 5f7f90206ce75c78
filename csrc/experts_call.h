// What the passes of an experts layer share.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "expert_sort.h"
#include "runtime.h"
#include "weights.h"

namespace handful {

// One call of the operation, its arguments checked.
struct ExpertsCall {
  const Gemm* gemm;
  int64_t experts, width, hidden;  // E, D, F
  Activation kind;
  bool bf16;
  Stack gate_up, down;
  const char* x;
  Type x_type;
  int64_t first_token = 0;  // that the plan's token 0 is
  const float* weights;     // (T, K)
  const Tensor& chosen;
  const std::optional<Tensor>& dropped;

  // Of y, of what is kept, and of the products.
  Type type() const { return bf16 ? Type::kBFloat16 : Type::kFloat32; }
  const char* x_row(int64_t token) const { return x + (first_token + token) * width * bytes_of(x_type); }
};

// Checks what `tokens` tokens chose, and the weights if there are any.
void check_choices(const Tensor& experts, int64_t tokens, const Tensor* weights, const std::optional<Tensor>& dropped);

// `experts` and `dropped` must outlive the call. `weights` null: nothing is weighted and summed in it.
ExpertsCall make_call(const Tensor& x, const Tensor& experts, const Tensor* weights,
                      const std::optional<Tensor>& dropped, const WeightTensors& gate_up, const WeightTensors& down,
                      const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias,
                      const std::string& activation, int64_t hidden, bool bf16);

// A block of one matrix's rows, and the panels that meet it.
struct GemmItem {
  int expert, rows, panels;
  int64_t row, panel;
};

// Items for `rows` rows in blocks of `block`, for every expert that `wanted` names.
template <class Wanted>
std::vector<GemmItem> gemm_items(const ExpertSort& sorted, int64_t rows, int64_t block, const Wanted& wanted) {
  std::vector<GemmItem> items;
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(sorted.first_panel.size()); ++e) {
    if (!wanted(e)) continue;
    for (int64_t p = sorted.first_panel[e]; p < sorted.first_panel[e + 1]; p += Workspace::kGroup) {
      const int64_t panels = std::min<int64_t>(Workspace::kGroup, sorted.first_panel[e + 1] - p);
      for (int64_t r = 0; r < rows; r += block) {
        items.push_back(
            {static_cast<int>(e), static_cast<int>(std::min(block, rows - r)), static_cast<int>(panels), r, p});
      }
    }
  }
  return items;
}

// What an item of `rows` rows costs for each value of its sum, in nanoseconds: a guess for `each`.
constexpr double kItemCost = 0.01 * kRows * kPanel;

// Fills rows `at` to `at + rows` of all tiles with the biases `row` to `row + rows` of one matrix.
void fill_with_bias(const Workspace& w, int panels, const Stack& stack, int64_t matrix, int64_t row, int at, int rows);

// Writes an item's tiles, transposed, to the rows that its assignments have in rows_ND.
void store_assignments(const ExpertsCall& call, const ExpertSort& sorted, const GemmItem& item, const Workspace& w,
                       float* rows_ND);

// Makes a panel of `count` rows of `width` values.
void pack_right(const Gemm& gemm, uint32_t* to, const char* const* rows, int count, Type type, int64_t width);

// Makes a panel of the rows that its assignments' tokens have in `x`.
void pack_panel(const ExpertsCall& call, const ExpertSort& sorted, int64_t panel, const char* x, Type type,
                uint32_t* to);

inline Right panels_of(const ExpertSort& sorted, int64_t first, int panels, const uint32_t* all, int64_t stride) {
  return {all + first * stride, stride, panels, sorted.panels[first + panels - 1].count};
}

// y[t] = sum over a token's assignments n of weights_TK[t][k] · rows_ND[n], in the order of k; `weights_TK` null: 1.
void sum_rows(int64_t width, const ExpertSort& sorted, const float* rows_ND, const float* weights_TK, char* y,
              Type type);

// -------------------------------------------------------------------------------------------------------------------
// Streaming.

// Vectors, prepared to meet the rows of a matrix like `m`.
class Prepared {
 public:
  Prepared(int64_t count, int64_t width, const Matrix& m)
      : m_(m), width_(width), bytes_((gemv().prepared_bytes(width, m) + 63) / 64 * 64), memory_(count * bytes_) {}

  char* row(int64_t i) const { return memory_.as<char>() + i * bytes_; }
  void fill(int64_t i, const char* x, Type type) const;
  void fill(int64_t i, const float* x, Type) const { gemv().prepare(row(i), x, width_, m_); }

 private:
  Matrix m_;
  int64_t width_, bytes_;
  Buffer memory_;
};

// Rows of one matrix, and the vectors `first` to `first + count` that meet them.
struct GemvItem {
  int matrix, count;
  int64_t first, row, rows;
};

// Cuts a matrix into items that are worth a thread's turn, of `matrices` like it that are read together. Long ones:
// memory is slow at the beginning of each.
void add_gemv_items(std::vector<GemvItem>& items, const Stack& stack, int64_t matrices, int64_t matrix,
                      int64_t first, int count);

// out(n)[row] = stack[matrix][row] · vector(n) + bias; out(n) are `stride` floats apart.
template <class Vector, class Out>
void run_gemv_item(const Stack& stack, const GemvItem& item, const Vector& vector, const Out& out, int64_t stride) {
  std::vector<const char*> vectors(item.count);
  for (int v = 0; v < item.count; ++v) vectors[v] = vector(item.first + v);
  float* to = out(item.first) + item.row;
  gemv().multiply(to, stride, stack[item.matrix], item.row, item.rows, vectors.data(), item.count, stack.width);
  if (stack.bias == nullptr) return;
  std::vector<float> bias(item.rows);
  stack.copy_bias(bias.data(), item.matrix, item.row, item.rows);
  for (int v = 0; v < item.count; ++v) {
    for (int64_t r = 0; r < item.rows; ++r) to[v * stride + r] += bias[r];
  }
}

// The cost of an item like the given one, for `each`.
inline double gemv_cost(const Stack& stack, const GemvItem& item) {
  return 0.05 * static_cast<double>(item.rows * stack.first.stride);
}

template <class Vector, class Out>
void run_gemv_items(const Stack& stack, const std::vector<GemvItem>& items, const Vector& vector, const Out& out,
                      int64_t stride) {
  const double cost = items.empty() ? 0 : gemv_cost(stack, items[0]);
  each(static_cast<int64_t>(items.size()), cost,
       [&](int64_t i) { run_gemv_item(stack, items[i], vector, out, stride); });
}

}  // namespace handful
