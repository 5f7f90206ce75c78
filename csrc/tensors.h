// What the operations use of torch: its stable ABI alone, so that one build serves torch 2.11 and later, and no Python
// symbol, so that it serves every Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace handful {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

inline const char* data_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

// Of a contiguous tensor, in numbers.
inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d > 1; --d) strides[d - 2] = strides[d - 1] * (shape[d - 1] > 0 ? shape[d - 1] : 1);
  return strides;
}

// A tensor on the CPU, not cleared. torch::stable's own functions go through the dispatcher, which takes several times as
// long: in a step of few tokens this would be noticed.
inline Tensor fresh(const std::vector<int64_t>& shape, ScalarType type) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  AtenTensorHandle made = nullptr;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Of the same shape and type, contiguous.
inline Tensor fresh_like(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.push_back(t.size(d));
  return fresh(shape, t.scalar_type());
}

}  // namespace handful
