#include "experts_call.h"

#include <algorithm>

namespace handful {

ExpertsWeights float_weights(const Tensor& gate_up, const Tensor& down, const MaybeTensor& gate_up_bias,
                             const MaybeTensor& down_bias, const std::string& activation) {
  const int64_t hidden = down.dim() == 3 ? down.size(2) : 0;
  return {gate_up, {}, down, {}, gate_up_bias, down_bias, activation, hidden, 0, 0};
}

ExpertsCall make_call(const Tensor& x, const Assignments& assignments, const ExpertsWeights& given, bool bf16) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x is not a contiguous matrix (tokens, width)");
  STD_TORCH_CHECK(given.gate_up.dim() == 3 && given.down.dim() == 3,
                  "gate_up and down are not (experts, rows, columns)");
  check_assignments(assignments, x.size(0));
  const int64_t count = given.gate_up.size(0), width = x.size(1), hidden = given.hidden;
  STD_TORCH_CHECK(count >= 1 && width >= 1 && hidden >= 1, "experts without experts, width or hidden values");
  const Activation kind = activation_of(given.activation);
  // Two codes are a byte at most. Beyond that `hidden` could not be doubled.
  STD_TORCH_CHECK(hidden / 2 <= given.down.size(2), "down has rows of ", given.down.size(2), ": hidden = ", hidden);
  Stack gate_up = make_stack({given.gate_up, given.gate_up_scales, given.bits, given.group}, given.gate_up_bias,
                             "gate_up", count, is_gated(kind) ? 2 * hidden : hidden, width);
  Stack down = make_stack({given.down, given.down_scales, given.bits, given.group}, given.down_bias, "down", count,
                          width, hidden);
  for (Matrix* m : {&gate_up.first, &down.first}) round_vectors(*m, bf16);
  const float* shares = assignments.weights ? assignments.weights->const_data_ptr<float>() : nullptr;
  return {&gemm_for(bf16, gate_up.first), count, width, hidden, kind, bf16, gate_up, down, data_of(x),
          float_type(x, "x"), assignments, shares, x.size(0)};
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
    Some<const float*> rows(K);
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
