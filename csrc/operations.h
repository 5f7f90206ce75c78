// The operations that fused layers are made of, and what they are given by name. The function that torch calls gathers
// these values from its arguments, once and in its schema's order.
#pragma once

#include "expert_sort.h"
#include "tensors.h"

namespace handful {

// The weight (D) of an RMSNorm.
struct Norm {
  Tensor weight;
  double eps;
};

// x (..., D) of float32 or bfloat16 -> the same, or as rows (T, D).
Tensor rms_norm(const Tensor& x, const Norm& norm, bool as_rows = false);

// Linear maps of the same x: weights (O, I) of float32 or bfloat16 (bits 0), or codes. Scales and biases are of all of
// them, or there are none.
struct LinearMaps {
  Tensors weights, scales, biases;
  int64_t bits, group;
};

// x (T, I) -> x · weightᵀ + bias (T, O) of each, in x's type.
Tensors linears(const Tensor& x, const LinearMaps& maps);

struct RouterRules {
  bool sigmoids;  // scores are sigmoids of the logits, and not their softmax
  int64_t groups, top_groups;
  bool two_best;  // a group's score is the sum of its two best, and not its best
  int64_t top_k;
  bool normalize;  // weights sum to `scale`
  double scale;
};

struct Router {
  Tensor weight;                   // (E, D)
  MaybeTensor bias, balance_bias;  // (E)
  MaybeTensor chosen;              // (T, K) int64: the experts to take, whatever the scores
  RouterRules rules;
};

struct Routed {
  Tensor logits, scores;  // (T, E) float32
  Tensor experts;         // (T, K) int64
  Tensor weights;         // (T, K) float32
};

Routed route(const Tensor& x, const Router& router);

// Weights of E experts: gate_up (E, G, D), down (E, D, F), their biases (E, G) and (E, D), of float32 or bfloat16 each;
// or codes with scales (handful/quantize.py).
struct ExpertsWeights {
  Tensor gate_up;
  MaybeTensor gate_up_scales;
  Tensor down;
  MaybeTensor down_scales, gate_up_bias, down_bias;
  std::string activation;
  int64_t hidden;       // F
  int64_t bits, group;  // bits 0: no codes
};

// x (T, D) -> y (T, D): every token's experts applied, weighted and summed. `bf16`: products of bfloat16 with float32
// sums, and y in bfloat16; otherwise all is float32.
Tensor experts(const Tensor& x, const Assignments& assignments, const ExpertsWeights& weights, bool bf16);

// Norms of queries and keys.
struct HeadNorms {
  MaybeTensor q, k;
  double eps;
  bool whole;  // over all heads, and not over each
};

struct Rope {
  Tensor cos, sin;  // (caches, r/2) of the new tokens' positions
  bool adjacent;    // pairs are neighbours, and not half a head apart
};

// The caches that the sequences lie in, in order.
struct Caches {
  Tensors keys, values;          // (b, J, C, d) of each, for b sequences; or rows in 8 bits (handful/kv_rows.py)
  std::vector<int64_t> lengths;  // tokens that each holds
};

struct DecodeAttention {
  HeadNorms norms;
  Rope rope;
  Caches caches;
  int64_t window;  // 0: none
  double scale;
  MaybeTensor sinks;  // (H)
};

// The next token of each of B sequences: q (B, H·d), k and v (B, J·d), before norm and rotation -> (B, H·d).
Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const DecodeAttention& attention);

}  // namespace handful
