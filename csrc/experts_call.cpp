#include "experts_call.h"

#include <algorithm>

namespace handful {

using torch::headeronly::ScalarType;

void check_choices(const Tensor& experts, int64_t tokens, const Tensor* weights, const std::optional<Tensor>& dropped) {
  STD_TORCH_CHECK(experts.dim() == 2 && experts.size(0) == tokens && experts.is_contiguous() &&
                      experts.scalar_type() == ScalarType::Long,
                  "experts is not a contiguous matrix (tokens, top_k) of type int64");
  const auto like_experts = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == experts.size(0) && t.size(1) == experts.size(1) && t.is_contiguous();
  };
  STD_TORCH_CHECK(weights == nullptr || (like_experts(*weights) && weights->scalar_type() == ScalarType::Float),
                  "weights is not a contiguous matrix of experts' shape of type float32");
  STD_TORCH_CHECK(!dropped || (like_experts(*dropped) && dropped->scalar_type() == ScalarType::Bool),
                  "dropped is not a contiguous matrix of experts' shape of type bool");
}

ExpertsCall make_call(const Tensor& x, const Tensor& experts, const Tensor* weights,
                      const std::optional<Tensor>& dropped, const WeightTensors& gate_up, const WeightTensors& down,
                      const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias,
                      const std::string& activation, int64_t hidden, bool bf16) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x is not a contiguous matrix (tokens, width)");
  STD_TORCH_CHECK(gate_up.codes.dim() == 3 && down.codes.dim() == 3,
                  "gate_up and down are not (experts, rows, columns)");
  check_choices(experts, x.size(0), weights, dropped);
  const int64_t count = gate_up.codes.size(0), width = x.size(1);
  STD_TORCH_CHECK(count >= 1 && width >= 1 && hidden >= 1, "experts without experts, width or hidden values");
  const Activation kind = activation_of(activation);
  // Two codes are a byte at most. Beyond that `hidden` could not be doubled.
  STD_TORCH_CHECK(hidden / 2 <= down.codes.size(2), "down has rows of ", down.codes.size(2), ": hidden = ", hidden);
  Stack first = make_stack(gate_up, gate_up_bias, "gate_up", count, is_gated(kind) ? 2 * hidden : hidden, width);
  Stack second = make_stack(down, down_bias, "down", count, width, hidden);
  for (Matrix* m : {&first.first, &second.first}) m->pairs = bf16 && m->type == Type::kBFloat16;
  return {&gemm_for(bf16, first.first.type),
          count,
          width,
          hidden,
          kind,
          bf16,
          first,
          second,
          static_cast<const char*>(x.const_data_ptr()),
          float_type(x, "x"),
          0,
          weights == nullptr ? nullptr : weights->const_data_ptr<float>(),
          experts,
          dropped};
}

void fill_with_bias(const Workspace& w, int panels, const Stack& stack, int64_t matrix, int64_t row, int at, int rows) {
  float bias[kRows];
  stack.copy_bias(bias, matrix, row, rows);
  for (int p = 0; p < panels; ++p) {
    for (int r = 0; r < rows; ++r) std::fill_n(w.tile(p) + (at + r) * kPanel, kPanel, bias[r]);
  }
}

void store_assignments(const ExpertsCall& call, const ExpertSort& sorted, const GemmItem& item, const Workspace& w,
                       float* rows_ND) {
  for (int p = 0; p < item.panels; ++p) {
    const Panel& panel = sorted.panels[item.panel + p];
    char* out[kPanel];
    for (int c = 0; c < panel.count; ++c) out[c] = reinterpret_cast<char*>(rows_ND + (panel.first + c) * call.width);
    call.gemm->store_transposed(out, item.row, Type::kFloat32, w.tile(p), item.rows, panel.count);
  }
}

void pack_right(const Gemm& gemm, uint32_t* to, const char* const* rows, int count, Type type, int64_t width) {
  if (gemm.quantize == nullptr) return gemm.pack_tokens(to, rows, count, type, width);
  const Buffer buffer(panel_units(width, gemm.values) * kPanel * 4);
  gemm.pack_tokens(buffer.as<uint32_t>(), rows, count, type, width);
  gemm.quantize(to, buffer.as<float>(), width, kInputLimit);
}

void pack_panel(const ExpertsCall& call, const ExpertSort& sorted, int64_t panel, const char* x, Type type,
                uint32_t* to) {
  const Panel& p = sorted.panels[panel];
  const char* rows[kPanel];
  for (int c = 0; c < p.count; ++c) {
    rows[c] = x + (call.first_token + sorted.token(p.first + c)) * call.width * bytes_of(type);
  }
  pack_right(*call.gemm, to, rows, p.count, type, call.width);
}

void sum_rows(int64_t width, const ExpertSort& sorted, const float* rows_ND, const float* weights_TK, char* y,
              Type type) {
  const int64_t K = sorted.top_k, D = width;
  const std::vector<float> ones(K, 1.0f);
  constexpr int64_t kTokens = 16;  // of an item
  each((sorted.tokens + kTokens - 1) / kTokens, 0.2 * static_cast<double>(kTokens * K * D), [&](int64_t i) {
    std::vector<const float*> rows(K);
    for (int64_t t = i * kTokens; t < std::min(sorted.tokens, (i + 1) * kTokens); ++t) {
      for (int64_t k = 0; k < K; ++k) {
        const int64_t n = sorted.place[t * K + k];
        rows[k] = n < 0 ? nullptr : rows_ND + n * D;
      }
      const float* weights = weights_TK == nullptr ? ones.data() : weights_TK + t * K;
      gemv().combine(y + t * D * bytes_of(type), type, rows.data(), weights, static_cast<int>(K), D);
    }
  });
}

void Prepared::fill(int64_t i, const char* x, Type type) const {
  if (type == Type::kFloat32) return fill(i, reinterpret_cast<const float*>(x), type);
  std::vector<float> wide(width_);
  gemv().to_float(wide.data(), x, type, width_);
  fill(i, wide.data(), Type::kFloat32);
}

void add_gemv_items(std::vector<GemvItem>& items, const Stack& stack, int64_t matrices, int64_t matrix,
                      int64_t first, int count) {
  // About 32 turns in all, but no item so short that it does not pay and none so long that the last one is waited for.
  const int64_t bytes = std::clamp<int64_t>(matrices * stack.bytes() / 32, 32 << 10, 512 << 10);
  const int64_t row_bytes = stack.bytes() / stack.rows;
  const int64_t some = std::max<int64_t>(bytes / row_bytes / 16 * 16, 16);
  for (int64_t r = 0; r < stack.rows; r += some) {
    items.push_back({static_cast<int>(matrix), count, first, r, std::min(some, stack.rows - r)});
  }
}

}  // namespace handful
