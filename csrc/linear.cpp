// One matrix for all tokens, by the experts' kernels.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "experts.h"
#include "layer.h"

namespace handful {
namespace {

void stream_tokens(const Stack& stack, const char* x, Type type, int64_t tokens, char* y) {
  const int64_t I = stack.width, O = stack.rows;
  const Prepared prepared(tokens, I, stack.first);
  each(tokens, 1.0 * I, [&](int64_t t) { prepared.fill(t, x + t * I * bytes_of(type), type); });
  const Buffer out_buffer(tokens * O * 4);
  float* out_TO = out_buffer.as<float>();
  std::vector<StreamItem> items;
  add_stream_items(items, stack, 1, 0, 0, static_cast<int>(tokens));
  run_stream_items(stack, items, [&](int64_t t) { return prepared.row(t); },
                   [&](int64_t t) { return out_TO + t * O; }, O);
  const float one = 1;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = out_TO + t * O;
    stream().combine(y + t * O * bytes_of(type), type, &row, &one, 1, O);
  }
}

void multiply_tokens(const Stack& stack, const char* x, Type type, int64_t tokens, char* y) {
  const Kernels& k = kernels(type == Type::kBFloat16);
  const int64_t I = stack.width, O = stack.rows, units = panel_units(I, k.values) * kPanel;
  const int64_t panels = (tokens + kPanel - 1) / kPanel;
  const Buffer x_buffer(panels * units * 4);
  uint32_t* x_panels = x_buffer.as<uint32_t>();
  const auto columns = [&](int64_t p) { return static_cast<int>(std::min<int64_t>(kPanel, tokens - p * kPanel)); };
  each(panels, 0.5 * I * kPanel, [&](int64_t p) {
    const char* rows[kPanel];
    for (int c = 0; c < columns(p); ++c) rows[c] = x + (p * kPanel + c) * I * bytes_of(type);
    k.pack_tokens(x_panels + p * units, rows, columns(p), type, I);
  });

  const int64_t row_blocks = (O + kRows - 1) / kRows, groups = (panels + Workspace::kGroup - 1) / Workspace::kGroup;
  each(row_blocks * groups, kItemCost * I, [&](int64_t i) {
    const int64_t row = i / groups * kRows, first = i % groups * Workspace::kGroup;
    const auto rows = static_cast<int>(std::min<int64_t>(kRows, O - row));
    const auto some_panels = static_cast<int>(std::min<int64_t>(Workspace::kGroup, panels - first));
    const Workspace& w = Workspace::mine();
    const Right right = {x_panels + first * units, units, some_panels, columns(first + some_panels - 1)};
    if (stack.bias != nullptr) fill_with_bias(w, some_panels, stack, 0, row, 0, rows);
    k.begin();
    multiply_block(k, w, rows, right, I, stack.bias != nullptr, [&](uint32_t* left, int64_t k0, int some) {
      k.pack_rows(left, stack.first, row, rows, k0, some);
    });
    k.end();
    for (int p = 0; p < some_panels; ++p) {
      char* out[kPanel];
      for (int c = 0; c < columns(first + p); ++c) out[c] = y + ((first + p) * kPanel + c) * O * bytes_of(type);
      k.store_transposed(out, row, type, w.tile(p), rows, columns(first + p));
    }
  });
}

Tensor run(const Tensor& x, const Given& weight, const MaybeTensor& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x is not a contiguous matrix (tokens, inputs)");
  STD_TORCH_CHECK(weight.codes.dim() == 2 && x.size(1) >= 1, "weight is not a matrix (outputs, inputs)");
  const Type type = float_type(x, "x");
  const int64_t tokens = x.size(0);
  const Stack stack = make_stack(weight, bias, "weight", 0, weight.codes.size(0), x.size(1));
  Tensor y = torch::stable::new_empty(x, {tokens, stack.rows});
  char* out = static_cast<char*>(y.mutable_data_ptr());
  if (tokens == 0 || stack.rows == 0) return y;
  const auto work = tokens <= kFew ? stream_tokens : multiply_tokens;
  work(stack, static_cast<const char*>(x.const_data_ptr()), type, tokens, out);
  return y;
}

}  // namespace

Tensor linear(Tensor x, Tensor weight, MaybeTensor bias) {
  const MaybeTensor none;
  return run(x, {weight, none}, bias);
}

Tensor linear_quantized(Tensor x, Tensor weight, Tensor scales, MaybeTensor bias, int64_t bits, int64_t group) {
  const MaybeTensor given = scales;
  return run(x, {weight, given, bits, group}, bias);
}

}  // namespace handful
