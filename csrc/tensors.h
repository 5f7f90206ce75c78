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

}  // namespace handful
