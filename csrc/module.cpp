// The operations that torch sees as torch.ops.handful.*. Only torch's stable ABI is used here and in the kernels, so
// that one build serves torch 2.11 and later, and no Python symbol, so that it serves every Python.
#include <torch/csrc/stable/library.h>

#include "bandwidth.h"
#include "isa.h"
#include "levels.h"
#include "operations.h"

namespace {

std::string isa() { return handful::names_of(handful::features()); }

// What a CPU of these features multiplies with, a line each: for what, by which level, and the features it needs.
std::string levels(std::string features) {
  const handful::Chosen chosen = handful::choose(handful::features_of(features));
  const auto line = [](const char* use, const auto* table) {
    return std::string(use) + ": " + table->name + ": " + handful::names_of(table->needs) + "\n";
  };
  return line("float32", chosen.float32) + line("bfloat16", chosen.bfloat16) + line("codes", chosen.codes) +
         line("few tokens", chosen.gemv);
}

}  // namespace

STABLE_TORCH_LIBRARY(handful, m) {
  m.def("isa() -> str");
  m.def("levels(str features) -> str");
  m.def("read_bandwidth(Tensor buffer, int repeats) -> (float, int)");
  m.def(
      "experts(Tensor x, Tensor experts, Tensor weights, Tensor? dropped, Tensor gate_up, Tensor down, "
      "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool bf16) -> Tensor");
  m.def(
      "experts_forward(Tensor x, Tensor experts, Tensor weights, Tensor? dropped, Tensor gate_up, Tensor down, "
      "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool bf16) -> (Tensor, Tensor)");
  m.def(
      "experts_backward(Tensor grad_y, Tensor x, Tensor experts, Tensor weights, Tensor? dropped, Tensor gate_up, "
      "Tensor down, Tensor? gate_up_bias, Tensor? down_bias, Tensor kept, str activation, bool bf16, bool for_x, "
      "bool for_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "experts_quantized(Tensor x, Tensor experts, Tensor weights, Tensor? dropped, Tensor gate_up, "
      "Tensor gate_up_scales, Tensor down, Tensor down_scales, Tensor? gate_up_bias, Tensor? down_bias, "
      "str activation, int hidden, int bits, int group, bool bf16) -> Tensor");
  m.def(
      "experts_rows(Tensor(a!) rows, Tensor x, Tensor experts, Tensor? dropped, Tensor places, Tensor gate_up, "
      "Tensor? gate_up_scales, Tensor down, Tensor? down_scales, Tensor? gate_up_bias, Tensor? down_bias, "
      "str activation, int hidden, int bits, int group, bool bf16) -> int");
  m.def(
      "experts_sum(Tensor rows, Tensor experts, Tensor weights, Tensor? dropped, int count, bool bf16) -> Tensor");
  m.def("experts_step(int count, int top_k) -> int");
  m.def(
      "linears(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases, int bits, int group) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("levels", TORCH_BOX(&levels));
  m.impl("experts_step", TORCH_BOX(&handful::experts_step));
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { 
  m.impl("read_bandwidth", TORCH_BOX(&handful::read_bandwidth));
  m.impl("experts", TORCH_BOX(&handful::experts));
  m.impl("experts_forward", TORCH_BOX(&handful::experts_forward));
  m.impl("experts_backward", TORCH_BOX(&handful::experts_backward));
  m.impl("experts_quantized", TORCH_BOX(&handful::experts_quantized));
  m.impl("experts_rows", TORCH_BOX(&handful::experts_rows));
  m.impl("experts_sum", TORCH_BOX(&handful::experts_sum));
  m.impl("linears", TORCH_BOX(&handful::linears));
}
