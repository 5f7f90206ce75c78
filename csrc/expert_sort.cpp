#include "expert_sort.h"

#include <algorithm>

#include "kernels.h"

namespace handful {

int64_t most_panels(int64_t assignments, int64_t experts) {
  // Every expert that has any may leave its last panel unfilled.
  return assignments / kPanel + std::min(assignments, experts);
}

Plan make_plan(const Tensor& experts, const std::optional<Tensor>& dropped, int64_t first, int64_t end,
               int64_t expert_count) {
  Plan plan;
  plan.tokens = end - first;
  plan.top_k = experts.size(1);
  const int64_t assignments = plan.tokens * plan.top_k;
  const int64_t* chosen = experts.const_data_ptr<int64_t>() + first * plan.top_k;
  const bool* out = dropped ? dropped->const_data_ptr<bool>() + first * plan.top_k : nullptr;

  plan.offsets.assign(expert_count + 1, 0);
  for (int64_t a = 0; a < assignments; ++a) {
    STD_TORCH_CHECK(chosen[a] >= 0 && chosen[a] < expert_count, "routing names expert ", chosen[a], ": there are ",
                    expert_count, ", counted from 0");
    if (out == nullptr || !out[a]) ++plan.offsets[chosen[a] + 1];
  }
  for (int64_t e = 0; e < expert_count; ++e) plan.offsets[e + 1] += plan.offsets[e];

  plan.order.resize(plan.offsets[expert_count]);
  plan.tokens_of.resize(plan.order.size());
  plan.place.resize(assignments);
  std::vector<int64_t> next(plan.offsets.begin(), plan.offsets.end() - 1);
  for (int64_t t = 0, a = 0; t < plan.tokens; ++t) {
    for (int64_t k = 0; k < plan.top_k; ++k, ++a) {
      const bool computed = out == nullptr || !out[a];
      plan.place[a] = computed ? next[chosen[a]]++ : -1;
      if (!computed) continue;
      plan.order[plan.place[a]] = a;
      plan.tokens_of[plan.place[a]] = t;
    }
  }

  plan.first_panel.reserve(expert_count + 1);
  for (int64_t e = 0; e < expert_count; ++e) {
    plan.first_panel.push_back(static_cast<int64_t>(plan.panels.size()));
    for (int64_t first = plan.offsets[e]; first < plan.offsets[e + 1]; first += kPanel) {
      const int count = static_cast<int>(std::min<int64_t>(kPanel, plan.offsets[e + 1] - first));
      plan.panels.push_back({static_cast<int>(e), count, first});
    }
  }
  plan.first_panel.push_back(static_cast<int64_t>(plan.panels.size()));
  return plan;
}

}  // namespace handful
