// A routing, sorted by expert.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace handful {

using torch::stable::Tensor;

// Up to kPanel assignments of one expert.
struct Panel {
  int expert;
  int count;
  int64_t first;  // of them, in ExpertSort::order
};

struct ExpertSort {
  int64_t tokens, top_k;
  std::vector<int64_t> order;      // assignments (token · top_k + slot) that are computed, by expert, earlier tokens first
  std::vector<int64_t> tokens_of;  // of each in `order`
  std::vector<int64_t> place;      // of each assignment in `order`; -1: it is dropped
  std::vector<int64_t> offsets;    // expert e owns order[offsets[e]] up to order[offsets[e + 1]]
  std::vector<Panel> panels;
  std::vector<int64_t> first_panel;  // expert e owns panels[first_panel[e]] up to panels[first_panel[e + 1]]

  int64_t size() const { return static_cast<int64_t>(order.size()); }
  int64_t load(int64_t e) const { return offsets[e + 1] - offsets[e]; }
  int64_t token(int64_t n) const { return tokens_of[n]; }
};

// Checks what `tokens` tokens chose, and the weights if there are any.
void check_choices(const Tensor& experts, int64_t tokens, const Tensor* weights, const std::optional<Tensor>& dropped);

// Panels that T·K assignments to E experts can need, whatever the routing.
int64_t most_panels(int64_t assignments, int64_t experts);

// Of tokens `first` up to `end`, which the plan counts from 0. Throws for an expert that does not exist.
ExpertSort sort_by_expert(const Tensor& experts, const std::optional<Tensor>& dropped, int64_t first, int64_t end,
                          int64_t expert_count);

}  // namespace handful
