// The next-token loss of a chunk of logits, and its gradient in their place.
#include <algorithm>
#include <vector>

#include "runtime.h"
#include "weights.h"

namespace handful {
namespace {

// logits (c, V) float32 become their gradient, probabilities - one-hot(target), targets (c) int64. Returns the sum of the
// losses, in nats.
double softmax_loss(Tensor logits, Tensor targets) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == ScalarType::Float &&
                      logits.size(1) >= 1,
                  "logits are not a contiguous matrix (tokens, vocabulary) of type float32");
  const int64_t tokens = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(targets.dim() == 1 && targets.size(0) == tokens && targets.is_contiguous() &&
                      targets.scalar_type() == ScalarType::Long,
                  "targets are not int64, one for each token");
  const int64_t* target = targets.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(0 <= target[t] && target[t] < vocabulary, "target ", target[t], ": the vocabulary has ", vocabulary);
  }
  float* rows = logits.mutable_data_ptr<float>();
  std::vector<double> losses(tokens);
  each(tokens, 4 * kRowCost * static_cast<double>(vocabulary), [&](int64_t t) {
    float* row = rows + t * vocabulary;
    const float own = row[target[t]];
    losses[t] = static_cast<double>(gemv().softmax(row, vocabulary)) - own;
    row[target[t]] -= 1;
  });
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) { m.def("softmax_loss(Tensor(a!) logits, Tensor targets) -> float"); }

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("softmax_loss", TORCH_BOX(&softmax_loss)); }

}  // namespace handful
