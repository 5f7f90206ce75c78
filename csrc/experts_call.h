// What the forward and the backward pass of the routed experts share.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "operations.h"

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
  const Assignments& assignments;
  const float* weights;     // (T, K); null: nothing is weighted and summed
  int64_t tokens;           // by whose number the kernels are chosen
  int64_t first_token = 0;  // that is token 0 in the sort

  // Of y, of the kept hidden values, and of the products.
  Type type() const { return bf16 ? Type::kBFloat16 : Type::kFloat32; }
  const char* x_row(int64_t token) const { return x + (first_token + token) * width * bytes_of(x_type); }
};

// Weights of float32 or bfloat16.
ExpertsWeights float_weights(const Tensor& gate_up, const Tensor& down, const MaybeTensor& gate_up_bias,
                             const MaybeTensor& down_bias, const std::string& activation);

// All that is given must outlive the call.
ExpertsCall make_call(const Tensor& x, const Assignments& assignments, const ExpertsWeights& weights, bool bf16);

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

// Writes an item's tiles, transposed, to the rows that its assignments have in rows_ND.
void store_assignments(const ExpertsCall& call, const ExpertSort& sorted, const GemmItem& item, const Workspace& w,
                       float* rows_ND);

// Makes a panel of the rows that its assignments' tokens have in `x`.
void pack_panel(const ExpertsCall& call, const ExpertSort& sorted, int64_t panel, const char* x, Type type,
                uint32_t* to);

inline Right panels_of(const ExpertSort& sorted, int64_t first, int panels, const uint32_t* all, int64_t stride) {
  return {all + first * stride, stride, panels, sorted.panels[first + panels - 1].count};
}

// y[t] = sum over a token's assignments n of weights_TK[t][k] · rows_ND[n], in the order of k; `weights_TK` null: 1.
void sum_rows(int64_t width, const ExpertSort& sorted, const float* rows_ND, const float* weights_TK, char* y,
              Type type);

}  // namespace handful
