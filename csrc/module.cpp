// torch.ops.handful: the operations that say what there is. The others are declared beside their code.
#include <torch/csrc/stable/library.h>

#include <string>

#include "isa.h"
#include "levels.h"

namespace {

std::string isa() { return handful::names_of(handful::features()); }

// The tables for a CPU of these features, a line each: the use, the level, and the features that it needs.
std::string levels(std::string features) {
  const handful::Chosen chosen = handful::choose(handful::features_of(features));
  const auto line = [](const char* use, const auto* table) {
    return std::string(use) + ": " + table->name + ": " + handful::names_of(table->needs) + "\n";
  };
  return line("float32", chosen.float32) + line("bfloat16", chosen.bfloat16) + line("codes", chosen.int8) +
         line("exact codes", chosen.exact_int8) + line("few tokens", chosen.gemv);
}

// The sizes that callers need to know, a line each.
std::string limits() {
  const auto line = [](const char* name, int64_t value) { return name + (": " + std::to_string(value)) + "\n"; };
  return line("panel", handful::kPanel) + line("gemv_max_tokens", handful::kGemvMaxTokens) +
         line("gemv_max_tokens_packed", handful::kGemvMaxTokensPacked) + line("gemv_max_call", handful::kGemvMaxCall) +
         line("code_piece", handful::kPiece) + line("code_block", handful::kBlock) + line("code_grid", handful::kGrid);
}

}  // namespace

STABLE_TORCH_LIBRARY(handful, m) {
  m.def("isa() -> str");
  m.def("levels(str features) -> str");
  m.def("limits() -> str");
  m.def("exact_activations() -> bool");
  m.def("set_exact_activations(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("levels", TORCH_BOX(&levels));
  m.impl("limits", TORCH_BOX(&limits));
  m.impl("exact_activations", TORCH_BOX(&handful::exact_activations));
  m.impl("set_exact_activations", TORCH_BOX(&handful::set_exact_activations));
}
