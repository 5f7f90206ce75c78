#include "expert_sort.h"

#include <algorithm>

#include "kernels.h"

namespace handful {

using torch::headeronly::ScalarType;

void check_choices(const Tensor& experts, int64_t tokens, const Tensor* weights, const std::optional<Tensor>& dropped) {
  STD_TORCH_CHECK(experts.dim() == 2 && experts.size(0) == tokens && experts.is_contiguous() &&
                      experts.scalar_type() == ScalarType::Long,
                  "experts is not a contiguous matrix (tokens, top_k) of type int64");
  const auto like_experts = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == experts.size(0) && t.size(1) == experts.size(1) && t.is_contiguous();
  };
  STD_TORCH_CHECK(weights == nullptr || (like_experts(*weights) && weights->scalar_type() == ScalarType::Float),
                  "weights is not a contiguous matrix of experts' shape of type float32");
  STD_TORCH_CHECK(!dropped || (like_experts(*dropped) && dropped->scalar_type() == ScalarType::Bool),
                  "dropped is not a contiguous matrix of experts' shape of type bool");
}

int64_t most_panels(int64_t assignments, int64_t experts) {
  // Every expert that has any may leave its last panel unfilled.
  return assignments / kPanel + std::min(assignments, experts);
}

ExpertSort sort_by_expert(const Tensor& experts, const std::optional<Tensor>& dropped, int64_t first, int64_t end,
                          int64_t expert_count) {
  ExpertSort sorted;
  sorted.tokens = end - first;
  sorted.top_k = experts.size(1);
  const int64_t assignments = sorted.tokens * sorted.top_k;
  const int64_t* chosen = experts.const_data_ptr<int64_t>() + first * sorted.top_k;
  const bool* out = dropped ? dropped->const_data_ptr<bool>() + first * sorted.top_k : nullptr;

  sorted.offsets.assign(expert_count + 1, 0);
  for (int64_t a = 0; a < assignments; ++a) {
    STD_TORCH_CHECK(chosen[a] >= 0 && chosen[a] < expert_count, "routing names expert ", chosen[a], ": there are ",
                    expert_count, ", counted from 0");
    if (out == nullptr || !out[a]) ++sorted.offsets[chosen[a] + 1];
  }
  for (int64_t e = 0; e < expert_count; ++e) sorted.offsets[e + 1] += sorted.offsets[e];

  sorted.order.resize(sorted.offsets[expert_count]);
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

  sorted.first_panel.reserve(expert_count + 1);
  for (int64_t e = 0; e < expert_count; ++e) {
    sorted.first_panel.push_back(static_cast<int64_t>(sorted.panels.size()));
    for (int64_t first = sorted.offsets[e]; first < sorted.offsets[e + 1]; first += kPanel) {
      const int count = static_cast<int>(std::min<int64_t>(kPanel, sorted.offsets[e + 1] - first));
      sorted.panels.push_back({static_cast<int>(e), count, first});
    }
  }
  sorted.first_panel.push_back(static_cast<int64_t>(sorted.panels.size()));
  return sorted;
}

}  // namespace handful
