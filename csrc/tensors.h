// What the operations use of torch: its stable ABI alone, so that one build serves torch 2.11 and later, and no Python
// symbol, so that it serves every Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>
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

// The sizes of a tensor. A vector would be allocated, and a step of few tokens makes dozens of tensors.
struct Shape {
  static constexpr int64_t kMost = 16;

  int64_t dims = 0;
  std::array<int64_t, kMost> sizes{};

  Shape() = default;
  Shape(std::initializer_list<int64_t> given) {
    for (const int64_t size : given) add(size);
  }
  void add(int64_t size) {
    STD_TORCH_CHECK(dims < kMost, "a tensor has more than ", kMost, " dimensions");
    sizes[dims++] = size;
  }
  // Of a contiguous tensor, in numbers.
  std::array<int64_t, kMost> strides() const {
    std::array<int64_t, kMost> found;
    found.fill(1);
    for (int64_t d = dims; d > 1; --d) found[d - 2] = found[d - 1] * (sizes[d - 1] > 0 ? sizes[d - 1] : 1);
    return found;
  }
};

// A tensor on the CPU, not cleared. torch::stable's own functions go through the dispatcher, which takes several times as
// long: in a step of few tokens this would be noticed.
inline Tensor fresh(const Shape& shape, ScalarType type) {
  AtenTensorHandle made = nullptr;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.dims, shape.sizes.data(), shape.strides().data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Of the same shape and type, contiguous.
inline Tensor fresh_like(const Tensor& t) {
  Shape shape;
  for (int64_t d = 0; d < t.dim(); ++d) shape.add(t.size(d));
  return fresh(shape, t.scalar_type());
}

}  // namespace handful
