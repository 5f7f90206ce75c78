// The largest logit as one operation. In bfloat16 torch takes longer for it than for the output layer.
#include <xmmintrin.h>

#include <algorithm>

#include "tensors.h"
#include "weights.h"

namespace handful {
namespace {

// The place of the largest of V logits, the first of equals, and it. A NaN is above all numbers, as it is to torch.
std::tuple<int64_t, double> largest(Tensor logits) {
  STD_TORCH_CHECK(logits.dim() == 1 && logits.is_contiguous() && logits.size(0) >= 1,
                  "logits is not a contiguous vector");
  const Type type = float_type(logits, "logits");
  constexpr int64_t kSome = 1024;
  alignas(64) float some[kSome];
  int64_t place = 0;
  float best = 0;
  for (int64_t first = 0; first < logits.size(0); first += kSome) {
    const int64_t count = std::min(kSome, logits.size(0) - first), whole = (count + 15) / 16 * 16;
    gemv().to_float(some, data_of(logits) + first * bytes_of(type), type, count);
    std::fill(some + count, some + whole, some[0]);
    __m128 most[4] = {_mm_load_ps(some), _mm_load_ps(some), _mm_load_ps(some), _mm_load_ps(some)};
    __m128 strange = _mm_cmpunord_ps(most[0], most[0]);
    for (int64_t i = 0; i < whole; i += 16) {
      for (int j = 0; j < 4; ++j) {
        const __m128 x = _mm_load_ps(some + i + 4 * j);
        most[j] = _mm_max_ps(x, most[j]);
        strange = _mm_or_ps(strange, _mm_cmpunord_ps(x, x));
      }
    }
    const __m128 top = _mm_max_ps(_mm_max_ps(most[0], most[1]), _mm_max_ps(most[2], most[3]));
    // Most parts have nothing above all that was before them, and are not read again.
    if (first > 0 && _mm_movemask_ps(_mm_or_ps(strange, _mm_cmpgt_ps(top, _mm_set1_ps(best)))) == 0) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (some[i] != some[i]) return {first + i, some[i]};
      if ((first == 0 && i == 0) || some[i] > best) {
        best = some[i];
        place = first + i;
      }
    }
  }
  return {place, best};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) { m.def("largest(Tensor logits) -> (int, float)"); }

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("largest", TORCH_BOX(&largest)); }

}  // namespace handful
