#include "expert_sort.h"

#include <algorithm>

#include "kernels.h"

namespace handful {

void check_assignments(const Assignments& given, int64_t tokens) {
  const Tensor& experts = given.experts;
  STD_TORCH_CHECK(experts.dim() == 2 && experts.size(0) == tokens && experts.is_contiguous() &&
                      experts.scalar_type() == ScalarType::Long,
                  "experts is not a contiguous matrix (tokens, top_k) of type int64");
  const auto check = [&](const MaybeTensor& t, ScalarType type, const char* message) {
    STD_TORCH_CHECK(!t || (t->dim() == 2 && t->size(0) == experts.size(0) && t->size(1) == experts.size(1) &&
                           t->is_contiguous() && t->scalar_type() == type),
                    message);
  };
  check(given.weights, ScalarType::Float, "weights is not a contiguous matrix of experts' shape of type float32");
  check(given.dropped, ScalarType::Bool, "dropped is not a contiguous matrix of experts' shape of type bool");
}

int64_t most_panels(int64_t assignments, int64_t experts) {
  // Every expert that has any may leave its last panel unfilled.
  return assignments / kPanel + std::min(assignments, experts);
}

ExpertSort sort_by_expert(const Assignments& given, int64_t first, int64_t end, int64_t experts) {
  ExpertSort sorted;
  sorted.tokens = end - first;
  sorted.top_k = given.experts.size(1);
  const int64_t assignments = sorted.tokens * sorted.top_k;
  const int64_t* chosen = given.experts.const_data_ptr<int64_t>() + first * sorted.top_k;
  const bool* out = given.dropped ? given.dropped->const_data_ptr<bool>() + first * sorted.top_k : nullptr;

  sorted.offsets.assign(experts + 1, 0);
  for (int64_t a = 0; a < assignments; ++a) {
    STD_TORCH_CHECK(chosen[a] >= 0 && chosen[a] < experts, "routing names expert ", chosen[a], ": there are ", experts,
                    ", counted from 0");
    if (out == nullptr || !out[a]) ++sorted.offsets[chosen[a] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) sorted.offsets[e + 1] += sorted.offsets[e];

  sorted.order.resize(sorted.offsets[experts]);
  sorted.tokens_of.resize(sorted.order.size());
  sorted.place.resize(assignments);
  std::vector<int64_t> next(sorted.offsets.begin(), sorted.offsets.end() - 1);
  for (int64_t t = 0, a = 0; t < sorted.tokens; ++t) {
    for (int64_t k = 0; k < sorted.top_k; ++k, ++a) {
      const bool computed = out == nullptr || !out[a];
      sorted.place[a] = computed ? next[chosen[a]]++ : -1;
      if (!computed) continue;
      sorted.order[sorted.place[a]] = a;
      sorted.tokens_of[sorted.place[a]] = t;
    }
  }

  sorted.first_panel.reserve(experts + 1);
  for (int64_t e = 0; e < experts; ++e) {
    sorted.first_panel.push_back(static_cast<int64_t>(sorted.panels.size()));
    for (int64_t n = sorted.offsets[e]; n < sorted.offsets[e + 1]; n += kPanel) {
      const int count = static_cast<int>(std::min<int64_t>(kPanel, sorted.offsets[e + 1] - n));
      sorted.panels.push_back({static_cast<int>(e), count, n});
    }
  }
  sorted.first_panel.push_back(static_cast<int64_t>(sorted.panels.size()));
  return sorted;
}

}  // namespace handful
