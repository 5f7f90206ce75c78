// What tokens chose, and the same sorted by expert: a panel is of one expert.
#pragma once

#include "tensors.h"

namespace handful {

struct Assignments {
  Tensor experts;       // (T, K) int64: the experts that each token chose
  MaybeTensor weights;  // (T, K) float32; none: nothing is weighted and summed
  MaybeTensor dropped;  // (T, K) bool: those that are not computed
};

// Throws unless they are those of `tokens` tokens.
void check_assignments(const Assignments& given, int64_t tokens);

// Up to kPanel assignments of one expert.
struct Panel {
  int expert;
  int count;
  int64_t first;  // its place in ExpertSort::order
};

struct ExpertSort {
  int64_t tokens, top_k;
  std::vector<int64_t> order;      // computed assignments (token · top_k + slot) by expert, earlier tokens first
  std::vector<int64_t> tokens_of;  // of each in `order`
  std::vector<int64_t> place;      // of each assignment in `order`; -1: it is dropped
  std::vector<int64_t> offsets;    // expert e owns order[offsets[e]] up to order[offsets[e + 1]]
  std::vector<Panel> panels;
  std::vector<int64_t> first_panel;  // expert e owns panels[first_panel[e]] up to panels[first_panel[e + 1]]

  int64_t size() const { return static_cast<int64_t>(order.size()); }
  int64_t load(int64_t e) const { return offsets[e + 1] - offsets[e]; }
  int64_t token(int64_t n) const { return tokens_of[n]; }
};

// Panels that T·K assignments to E experts can need, whatever the routing.
int64_t most_panels(int64_t assignments, int64_t experts);

// Sorts those of tokens `first` up to `end`, which the result counts from 0, among `experts` experts. Throws for an
// expert that does not exist.
ExpertSort sort_by_expert(const Assignments& given, int64_t first, int64_t end, int64_t experts);

}  // namespace handful
