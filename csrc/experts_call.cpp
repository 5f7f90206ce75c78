#include "experts_call.h"

#include <algorithm>

namespace handful {

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

void store_assignments(const ExpertsCall& call, const ExpertSort& sorted, const GemmItem& item, const Workspace& w,
                       float* rows_ND) {
  for (int p = 0; p < item.panels; ++p) {
    const Panel& panel = sorted.panels[item.panel + p];
    char* out[kPanel];
    for (int c = 0; c < panel.count; ++c) out[c] = reinterpret_cast<char*>(rows_ND + (panel.first + c) * call.width);
    call.gemm->store_transposed(out, item.row, Type::kFloat32, w.tile(p), item.rows, panel.count);
  }
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

}  // namespace handful
