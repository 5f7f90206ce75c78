// The routed feed-forward network as one operation: every token's chosen experts applied, weighted and summed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace handful {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// x (T, D) float32 or bfloat16 · experts (T, K) int64 · weights (T, K) float32 · dropped (T, K) bool ·
// gate_up (E, G, D), down (E, D, F), their biases (E, G) and (E, D): float32 or bfloat16 each.
//
// bf16: products of bfloat16 with float32 sums, and y in bfloat16; otherwise everything is float32.
Tensor experts(Tensor x, Tensor experts, Tensor weights, MaybeTensor dropped, Tensor gate_up, Tensor down,
               MaybeTensor gate_up_bias, MaybeTensor down_bias, std::string activation, bool bf16);

// The same, and what the backward pass needs: the hidden values before their activation, as (panels, G, 32).
std::tuple<Tensor, Tensor> experts_forward(Tensor x, Tensor experts, Tensor weights, MaybeTensor dropped,
                                           Tensor gate_up, Tensor down, MaybeTensor gate_up_bias,
                                           MaybeTensor down_bias, std::string activation, bool bf16);

// The same on quantised weights: codes and scales (see handful/quantize.py).
Tensor experts_quantized(Tensor x, Tensor experts, Tensor weights, MaybeTensor dropped, Tensor gate_up,
                         Tensor gate_up_scales, Tensor down, Tensor down_scales, MaybeTensor gate_up_bias,
                         MaybeTensor down_bias, std::string activation, int64_t hidden, int64_t bits, int64_t group,
                         bool bf16);

// The same in parts, of weights that are not all there: `experts_rows` for one set of experts after another, each once,
// then `experts_sum`. The bits are those of the whole if x has at most `experts_step` tokens at a time.
//
// places (E) int64: which of the given matrices is an expert's; below 0: none is, and its rows are left as they are.
// rows (N, D) float32: a row for each assignment that is computed, by expert, earlier tokens first.
// Returns how many rows were written.
int64_t experts_rows(Tensor rows, Tensor x, Tensor experts, MaybeTensor dropped, Tensor places, Tensor gate_up,
                     MaybeTensor gate_up_scales, Tensor down, MaybeTensor down_scales, MaybeTensor gate_up_bias,
                     MaybeTensor down_bias, std::string activation, int64_t hidden, int64_t bits, int64_t group,
                     bool bf16);

// y (T, D): the rows weighted and summed; `count` is E.
Tensor experts_sum(Tensor rows, Tensor experts, Tensor weights, MaybeTensor dropped, int64_t count, bool bf16);

// How many tokens, each with `top_k` of `count` experts, the operations above compute at a time.
int64_t experts_step(int64_t count, int64_t top_k);

// Gradients of x, weights, gate_up, down, gate_up_bias and down_bias; those of weights and biases only `for_parameters`,
// and of x only `for_x` (otherwise they are empty tensors).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    Tensor grad_y, Tensor x, Tensor experts, Tensor weights, MaybeTensor dropped, Tensor gate_up, Tensor down,
    MaybeTensor gate_up_bias, MaybeTensor down_bias, Tensor kept, std::string activation, bool bf16, bool for_x,
    bool for_parameters);

// x (T, I) · each weight (O, I) → (T, O) in x's type, of weights of one dtype. `scales` and `biases` are empty, or of all
// of them.
std::vector<Tensor> linears(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales,
                            std::vector<Tensor> biases, int64_t bits, int64_t group);

// What decoding does beside them: attention_decode.cpp and router.cpp say what is given.
Tensor rms_norm(Tensor x, Tensor weight, double eps);
Tensor decode_attention(Tensor q, Tensor k, Tensor v, MaybeTensor q_norm, MaybeTensor k_norm, double eps, bool whole_norm,
                  Tensor cos, Tensor sin, bool adjacent, std::vector<Tensor> keys, std::vector<Tensor> values,
                  std::vector<int64_t> lengths, int64_t window, double scale, MaybeTensor sinks);
std::tuple<Tensor, Tensor, Tensor, Tensor> route(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor balance_bias,
                                                 MaybeTensor chosen, bool sigmoids, int64_t groups, int64_t top_groups,
                                                 bool two_best, int64_t top_k, bool normalize, double scale);

}  // namespace handful
