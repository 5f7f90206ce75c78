// The operations that torch sees as torch.ops.handful.*. Only torch's stable ABI is used here and in the kernels, so
// that one build serves torch 2.11 and later, and no Python symbol, so that it serves every Python.
#include <torch/csrc/stable/library.h>

#include "bandwidth.h"
#include "isa.h"

STABLE_TORCH_LIBRARY(handful, m) {
  m.def("isa() -> str");
  m.def("read_bandwidth(Tensor buffer, int repeats) -> (float, int)");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&handful::feature_names)); }

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("read_bandwidth", TORCH_BOX(&handful::read_bandwidth)); }
