// RMSNorm as one operation.
#include <algorithm>

#include "operations.h"
#include "runtime.h"
#include "weights.h"

namespace handful {

Tensor rms_norm(const Tensor& x, const Norm& norm, bool as_rows) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "x is not contiguous");
  const Type type = float_type(x, "x");
  const int64_t width = x.size(x.dim() - 1);
  const NormWeight weight = norm_weight(norm.weight, width, "weight");
  Tensor y = as_rows ? fresh({x.numel() / std::max<int64_t>(width, 1), width}, x.scalar_type()) : fresh_like(x);
  if (x.numel() == 0) return y;
  const char* from = data_of(x);
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t rows = x.numel() / width, bytes = width * bytes_of(type), some = std::max<int64_t>(1, 16384 / width);
  each((rows + some - 1) / some, kRowCost * static_cast<double>(width * some), [&](int64_t i) {
    const Buffer buffer(width * 4);
    float* row = buffer.as<float>();
    for (int64_t r = i * some; r < std::min(rows, (i + 1) * some); ++r) {
      gemv().to_float(row, from + r * bytes, type, width);
      gemv().normalize(row, row, weight.data, weight.type, static_cast<float>(norm.eps), width);
      gemv().from_float(to + r * bytes, row, type, width);
    }
  });
  return y;
}

namespace {

Tensor rms_norm_op(Tensor x, Tensor weight, double eps) { return rms_norm(x, {weight, eps}); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) { m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm_op)); }

}  // namespace handful
