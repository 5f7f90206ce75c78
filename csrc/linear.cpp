// Linear maps of the same x, one or several at once.
#include <algorithm>

#include "gemm.h"
#include "gemv.h"
#include "operations.h"

namespace handful {
namespace {

// Few tokens: each weight is read once. The matrices are of one type and width.
void multiply_gemv(const std::vector<Stack>& stacks, const char* x, Type type, int64_t tokens,
                   const std::vector<char*>& y) {
  const Stack& like = stacks[0];
  const int64_t I = like.width;
  const Prepared prepared(tokens, I, like.first, kByteLimits.input);
  each(tokens, 1.0 * I, [&](int64_t t) { prepared.fill(t, x + t * I * bytes_of(type), type); });
  int64_t rows = 0;
  for (const Stack& stack : stacks) rows += stack.rows;
  const Buffer out_buffer(tokens * rows * 4);
  Some<float*> out(static_cast<int64_t>(stacks.size()));
  std::vector<GemvItem> items, own;
  std::vector<size_t> matrix;  // of each item
  for (auto* all : {&items, &own}) all->reserve(kItems);
  matrix.reserve(kItems);
  for (size_t m = 0; m < stacks.size(); ++m) {
    out[m] = m == 0 ? out_buffer.as<float>() : out[m - 1] + tokens * stacks[m - 1].rows;
    own.clear();
    if (stacks[m].rows > 0) {
      add_gemv_items(own, stacks[m], static_cast<int64_t>(stacks.size()), 0, 0, static_cast<int>(tokens));
    }
    if (m + 1 == stacks.size()) taper(own);
    items.insert(items.end(), own.begin(), own.end());
    matrix.resize(items.size(), m);
  }
  if (items.empty()) return;
  each(static_cast<int64_t>(items.size()), gemv_cost(like, items[0]), [&](int64_t i) {
    const Stack& stack = stacks[matrix[i]];
    run_gemv_item(stack, items[i], [&](int64_t t) { return prepared.row(t); },
                    [&](int64_t t) { return out[matrix[i]] + t * stack.rows; }, stack.rows);
  });
  const float one = 1;
  for (size_t m = 0; m < stacks.size(); ++m) {
    const int64_t O = stacks[m].rows;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = out[m] + t * O;
      gemv().combine(y[m] + t * O * bytes_of(type), type, &row, &one, 1, O);
    }
  }
}

// Many tokens: they are packed once for all matrices.
void multiply_gemm(const std::vector<Stack>& stacks, const char* x, Type type, int64_t tokens,
                   const std::vector<char*>& y) {
  const Gemm& gemm = gemm_for(type == Type::kBFloat16, stacks[0].first);
  const int64_t I = stacks[0].width, units = right_units(gemm, I);
  const int64_t panels = (tokens + kPanel - 1) / kPanel;
  const Buffer x_buffer(panels * units * 4);
  uint32_t* x_panels = x_buffer.as<uint32_t>();
  const auto columns = [&](int64_t p) { return static_cast<int>(std::min<int64_t>(kPanel, tokens - p * kPanel)); };
  each(panels, 0.5 * I * kPanel, [&](int64_t p) {
    const char* rows[kPanel];
    for (int c = 0; c < columns(p); ++c) rows[c] = x + (p * kPanel + c) * I * bytes_of(type);
    pack_right(gemm, x_panels + p * units, rows, columns(p), type, I);
  });

  struct Item {
    size_t matrix;
    int64_t row, panel;
  };
  std::vector<Item> items;
  for (size_t m = 0; m < stacks.size(); ++m) {
    for (int64_t row = 0; row < stacks[m].rows; row += kRows) {
      for (int64_t p = 0; p < panels; p += Workspace::kGroup) items.push_back({m, row, p});
    }
  }
  each(static_cast<int64_t>(items.size()), kItemCost * I, [&](int64_t i) {
    const auto [m, row, first] = items[i];
    const Stack& stack = stacks[m];
    const int64_t O = stack.rows;
    const auto rows = static_cast<int>(std::min<int64_t>(kRows, O - row));
    const auto some_panels = static_cast<int>(std::min<int64_t>(Workspace::kGroup, panels - first));
    const Workspace& w = Workspace::mine();
    const Right right = {x_panels + first * units, units, some_panels, columns(first + some_panels - 1)};
    if (stack.bias != nullptr) fill_with_bias(w, some_panels, stack, 0, row, 0, rows);
    gemm.begin();
    multiply_matrix(gemm, w, {stack.first, rows, 1, {row}}, right, I, stack.bias != nullptr);
    gemm.end();
    for (int p = 0; p < some_panels; ++p) {
      char* out[kPanel];
      for (int c = 0; c < columns(first + p); ++c) out[c] = y[m] + ((first + p) * kPanel + c) * O * bytes_of(type);
      gemm.store_transposed(out, row, type, w.tile(p), rows, columns(first + p));
    }
  });
}

}  // namespace

Tensors linears(const Tensor& x, const LinearMaps& maps) {
  const size_t count = maps.weights.size();
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x is not a contiguous matrix (tokens, inputs)");
  STD_TORCH_CHECK((maps.scales.empty() || maps.scales.size() == count) &&
                      (maps.biases.empty() || maps.biases.size() == count),
                  "scales and biases are not of all weights");
  const Type type = float_type(x, "x");
  const int64_t tokens = x.size(0);
  STD_TORCH_CHECK(count > 0, "there is no weight");
  std::vector<Stack> stacks;
  Tensors results;
  std::vector<char*> y;
  bool alike = true;
  stacks.reserve(count);
  results.reserve(count);
  y.reserve(count);
  for (size_t m = 0; m < count; ++m) {
    const Tensor& weight = maps.weights[m];
    STD_TORCH_CHECK(weight.dim() == 2 && x.size(1) >= 1, "weight is not a matrix (outputs, inputs)");
    const MaybeTensor scale = maps.scales.empty() ? MaybeTensor() : MaybeTensor(maps.scales[m]);
    const MaybeTensor bias = maps.biases.empty() ? MaybeTensor() : MaybeTensor(maps.biases[m]);
    stacks.push_back(make_stack({weight, scale, maps.bits, maps.group}, bias, "weight", 0, weight.size(0), x.size(1)));
    results.push_back(fresh({tokens, stacks[m].rows}, x.scalar_type()));
    y.push_back(static_cast<char*>(results[m].mutable_data_ptr()));
    round_vectors(stacks[m].first, type == Type::kBFloat16);
    alike = alike && stacks[m].first.type == stacks[0].first.type;
  }
  STD_TORCH_CHECK(alike, "weights are not of one dtype");
  if (tokens == 0) return results;
  const auto multiply = tokens <= gemv_max_tokens(stacks[0].first) ? multiply_gemv : multiply_gemm;
  multiply(stacks, data_of(x), type, tokens, y);
  return results;
}

namespace {

Tensors linears_op(Tensor x, Tensors weights, Tensors scales, Tensors biases, int64_t bits, int64_t group) {
  return linears(x, {weights, scales, biases, bits, group});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) {
  m.def("linears(Tensor x, Tensor[] weights, Tensor[] scales, Tensor[] biases, int bits, int group) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("linears", TORCH_BOX(&linears_op)); }

}  // namespace handful
