// A router for few tokens as one operation: logits, scores, the chosen experts and their weights. Through torch it
// would be a dozen, each slower than its maths.
#include <algorithm>
#include <cmath>
#include <limits>

#include "gemv.h"
#include "operations.h"

namespace handful {
namespace {

constexpr float kOut = -std::numeric_limits<float>::infinity();

// A NaN is above all numbers, as it is to torch, so that it shows in the result.
bool above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The places of the `count` largest of `size` numbers, the largest first, earlier places first among equals.
void largest(int64_t* places, int64_t count, const float* numbers, int64_t size) {
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < size; ++i) {
      if (std::find(places, places + k, i) != places + k) continue;
      if (best < 0 || above(numbers[i], numbers[best])) best = i;
    }
    places[k] = best;
  }
}

// Rules out what is not in the best `kept` of `groups` groups of experts.
void limit_groups(float* select, int64_t experts, int64_t groups, int64_t kept, bool two_best) {
  const int64_t size = experts / groups, together = two_best ? 2 : 1;
  std::vector<float> scores(groups);
  std::vector<int64_t> places(std::max(kept, together));
  for (int64_t g = 0; g < groups; ++g) {
    largest(places.data(), together, select + g * size, size);
    for (int64_t i = 0; i < together; ++i) scores[g] += select[g * size + places[i]];
  }
  largest(places.data(), kept, scores.data(), groups);
  for (int64_t g = 0; g < groups; ++g) {
    const bool in = std::find(places.begin(), places.begin() + kept, g) != places.begin() + kept;
    if (!in) std::fill_n(select + g * size, size, kOut);
  }
}

const float* floats(const MaybeTensor& given, int64_t size, const char* name) {
  if (!given.has_value()) return nullptr;
  STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == size && given->is_contiguous() &&
                      given->scalar_type() == ScalarType::Float,
                  name, " is not float32, one for each expert");
  return given->const_data_ptr<float>();
}

}  // namespace

Routed route(const Tensor& x, const Router& router) {
  const Tensor& weight = router.weight;
  const auto [sigmoids, groups, top_groups, two_best, K, normalize, scale] = router.rules;
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x is not a contiguous matrix (tokens, width)");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && x.size(1) >= 1,
                  "weight is not a matrix (experts, width)");
  const int64_t T = x.size(0), D = x.size(1), E = weight.size(0);
  STD_TORCH_CHECK(1 <= K && K <= E, "top_k is not from 1 to the number of experts");
  STD_TORCH_CHECK(groups >= 1 && E % groups == 0 && 1 <= top_groups && top_groups <= groups &&
                      (!two_best || E / groups >= 2),
                  "groups do not divide the experts");
  const Type type = float_type(x, "x");
  const Stack stack = make_stack({weight, {}}, router.bias, "weight", 0, E, D);
  const float* balance = floats(router.balance_bias, E, "balance_bias");
  if (router.chosen) check_assignments({*router.chosen, {}, {}}, T);
  STD_TORCH_CHECK(!router.chosen || router.chosen->size(1) == K, "chosen is not of top_k experts");

  Tensor logits = fresh({T, E}, ScalarType::Float);
  Tensor scores = fresh({T, E}, ScalarType::Float);
  Tensor experts = fresh({T, K}, ScalarType::Long);
  Tensor weights = fresh({T, K}, ScalarType::Float);
  if (T == 0) return {logits, scores, experts, weights};
  auto* logit = logits.mutable_data_ptr<float>();
  auto* score = scores.mutable_data_ptr<float>();
  auto* expert = experts.mutable_data_ptr<int64_t>();
  auto* share = weights.mutable_data_ptr<float>();

  const Prepared prepared(T, D, stack.first);
  const char* rows = data_of(x);
  for (int64_t t = 0; t < T; ++t) prepared.fill(t, rows + t * D * bytes_of(type), type);
  std::vector<GemvItem> items;
  items.reserve(kItems);
  add_gemv_items(items, stack, 1, 0, 0, static_cast<int>(T));
  run_gemv_items(stack, items, [&](int64_t t) { return prepared.row(t); }, [&](int64_t t) { return logit + t * E; }, E);

  const int64_t* given = router.chosen ? router.chosen->const_data_ptr<int64_t>() : nullptr;
  std::vector<float> select(E);
  for (int64_t t = 0; t < T; ++t, score += E, expert += K, share += K) {
    gemv().score(score, logit + t * E, sigmoids, E);
    if (given != nullptr) {
      std::copy_n(given + t * K, K, expert);
      for (int64_t k = 0; k < K; ++k) {
        STD_TORCH_CHECK(0 <= expert[k] && expert[k] < E, "choice names expert ", expert[k], ": there are ", E,
                        ", counted from 0");
      }
    } else {
      for (int64_t e = 0; e < E; ++e) select[e] = balance == nullptr ? score[e] : score[e] + balance[e];
      if (top_groups < groups) limit_groups(select.data(), E, groups, top_groups, two_best);
      largest(expert, K, select.data(), E);
    }
    float sum = 1e-20f;  // all sigmoids can be next to 0
    for (int64_t k = 0; k < K; ++k) {
      share[k] = score[expert[k]];
      sum += share[k];
    }
    for (int64_t k = 0; k < K; ++k) share[k] = static_cast<float>(scale) * (normalize ? share[k] / sum : share[k]);
  }
  return {logits, scores, experts, weights};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> route_op(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor balance_bias,
                                                    MaybeTensor chosen, bool sigmoids, int64_t groups,
                                                    int64_t top_groups, bool two_best, int64_t top_k, bool normalize,
                                                    double scale) {
  const RouterRules rules = {sigmoids, groups, top_groups, two_best, top_k, normalize, scale};
  const Routed found = route(x, {weight, bias, balance_bias, chosen, rules});
  return {found.logits, found.scores, found.experts, found.weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) {
  m.def(
      "route(Tensor x, Tensor weight, Tensor? bias, Tensor? balance_bias, Tensor? chosen, bool sigmoids, int groups, "
      "int top_groups, bool two_best, int top_k, bool normalize, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("route", TORCH_BOX(&route_op)); }

}  // namespace handful
