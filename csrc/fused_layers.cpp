// A layer of few tokens in two operations: attention, and the feed-forward network or the mixture, each with the norm
// before it and the sum after it. They call what the separate operations call, and round where those do, so that the
// bits are the same.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "experts_call.h"
#include "operations.h"
#include "runtime.h"

namespace handful {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

using Tensors = std::vector<Tensor>;

Tensor whole(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensors whole(const Tensors& all) {
  Tensors found;
  for (const Tensor& t : all) found.push_back(whole(t));
  return found;
}

MaybeTensor whole(const MaybeTensor& t) { return t.has_value() ? MaybeTensor(whole(*t)) : t; }

Tensors list_of(const MaybeTensor& t) { return t.has_value() ? Tensors{*t} : Tensors(); }

// Those from `first` up to `end`, if there are any at all.
Tensors part(const Tensors& all, size_t first, size_t end) {
  return all.empty() ? all : Tensors(all.begin() + static_cast<int64_t>(first), all.begin() + static_cast<int64_t>(end));
}

// An operation of torch's own, whose bits no kernel of ours has.
template <class... Given>
Tensor torchs(const char* name, const char* overload, const Given&... given) {
  std::array<StableIValue, sizeof...(given)> stack{from(given)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// x (..., D), normed, as rows (T, D).
Tensor normed(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t width = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
  STD_TORCH_CHECK(width >= 1, "x has no width");
  return torch::stable::view(rms_norm(x, weight, eps), {x.numel() / width, width});
}

// x + scale · y, of as many numbers, in x's shape and type. As torch rounds it: scale · y first.
Tensor added(const Tensor& x, const Tensor& y, double scale) {
  const Type type = float_type(x, "x");
  STD_TORCH_CHECK(float_type(y, "y") == type && y.numel() == x.numel() && y.is_contiguous(), "y does not fit x");
  Tensor out = torch::stable::empty_like(x);
  const char *left = static_cast<const char*>(x.const_data_ptr()), *right = static_cast<const char*>(y.const_data_ptr());
  char* sums = static_cast<char*>(out.mutable_data_ptr());
  constexpr int64_t kSome = 4096;
  each((x.numel() + kSome - 1) / kSome, 1.0 * kSome, [&](int64_t i) {
    const int64_t count = std::min(kSome, x.numel() - i * kSome), at = i * kSome * bytes_of(type);
    const Buffer buffer(2 * kSome * 4);
    float *sum = buffer.as<float>(), *more = sum + kSome;
    gemv().to_float(more, right + at, type, count);
    if (scale != 1) {
      for (int64_t n = 0; n < count; ++n) more[n] *= static_cast<float>(scale);
      gemv().from_float(sums + at, more, type, count);
      gemv().to_float(more, sums + at, type, count);
    }
    gemv().to_float(sum, left + at, type, count);
    for (int64_t n = 0; n < count; ++n) sum[n] += more[n];
    gemv().from_float(sums + at, sum, type, count);
  });
  return out;
}

// The hidden activation as experts/reference.py has it: h (T, G) -> (T, F).
Tensor activated(const Tensor& h, const std::string& activation) {
  const std::string exact = "none";
  if (activation == "relu") return torchs("aten::relu", "", h);
  if (activation == "gelu") return torchs("aten::gelu", "", h, exact);
  STD_TORCH_CHECK(activation == "swiglu" || activation == "geglu", "activation = '", activation,
                  "': one of swiglu, geglu, gelu, relu");
  const int64_t hidden = h.size(1) / 2;
  Tensor all = h;
  const Tensor gate = torch::stable::narrow(all, 1, 0, hidden), up = torch::stable::narrow(all, 1, hidden, hidden);
  const Tensor open = activation == "swiglu" ? torchs("aten::silu", "", gate) : torchs("aten::gelu", "", gate, exact);
  return torchs("aten::mul", "Tensor", open, up);
}

// x (T, D) through a dense network of gate_up (G, D) and down (D, F).
Tensor feed_forward(const Tensor& x, const Tensors& weights, const Tensors& scales, int64_t bits, int64_t group,
                    const std::string& activation) {
  STD_TORCH_CHECK(weights.size() == 2 && (scales.empty() || scales.size() == 2), "weights are not gate_up and down");
  const Tensor h = linears(x, {whole(weights[0])}, part(scales, 0, 1), {}, bits, group)[0];
  return linears(activated(h, activation), {whole(weights[1])}, part(scales, 1, 2), {}, bits, group)[0];
}

}  // namespace

// x (..., D) -> x + residual_scale · attention of the normed x, of one new token of each sequence: `linears` by the
// weights of q, k and v, `decode_attention`, and `linears` by that of o. `biases` are of q, k and v, or none.
Tensor attend_layer(Tensor x, Tensor norm, double norm_eps, Tensors weights, Tensors scales, Tensors biases,
                    MaybeTensor o_bias, int64_t bits, int64_t group, MaybeTensor q_norm, MaybeTensor k_norm, double eps,
                    bool whole_norm, Tensor cos, Tensor sin, bool adjacent, Tensors keys, Tensors values,
                    std::vector<int64_t> lengths, int64_t window, double scale, MaybeTensor sinks,
                    double residual_scale) {
  STD_TORCH_CHECK(weights.size() == 4 && (scales.empty() || scales.size() == 4), "weights are not of q, k, v and o");
  x = whole(x);
  const Tensors qkv = linears(normed(x, norm, norm_eps), whole(part(weights, 0, 3)), part(scales, 0, 3), whole(biases),
                              bits, group);
  const Tensor answer = decode_attention(qkv[0], qkv[1], qkv[2], q_norm, k_norm, eps, whole_norm, cos, sin, adjacent, keys,
                                   values, lengths, window, scale, sinks);
  const Tensor y = linears(answer, {whole(weights[3])}, part(scales, 3, 4), list_of(whole(o_bias)), bits, group)[0];
  return added(x, y, residual_scale);
}

// x (..., D) -> x + residual_scale · the mixture of the normed x, and what `route` gives: `route`, then `experts` or
// `experts_quantized`, plus the shared experts' output if `shared` holds their gate_up and down, times its gate's sigmoid
// if there is one. Without scales, the gate is multiplied by torch.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_layer(
    Tensor x, Tensor norm, double norm_eps, Tensor router, MaybeTensor router_bias, MaybeTensor balance_bias,
    MaybeTensor chosen, MaybeTensor dropped, bool sigmoids, int64_t groups, int64_t top_groups, bool two_best,
    int64_t top_k, bool normalize, double route_scale, Tensor gate_up, MaybeTensor gate_up_scales, Tensor down,
    MaybeTensor down_scales, MaybeTensor gate_up_bias, MaybeTensor down_bias, std::string activation, int64_t hidden,
    int64_t bits, int64_t group, Tensors shared, Tensors shared_scales, int64_t shared_bits, int64_t shared_group,
    MaybeTensor shared_gate, MaybeTensor shared_gate_scales, int64_t gate_bits, int64_t gate_group,
    double residual_scale) {
  x = whole(x);
  const Tensor rows = normed(x, norm, norm_eps);
  const auto [logits, scores, names, weights] = route(rows, whole(router), router_bias, balance_bias, chosen, sigmoids,
                                                      groups, top_groups, two_best, top_k, normalize, route_scale);
  const bool bf16 = float_type(x, "x") == Type::kBFloat16;
  STD_TORCH_CHECK(bits == 0 || (gate_up_scales.has_value() && down_scales.has_value()), "codes have no scales");
  Tensor y = bits == 0 ? experts(rows, names, weights, dropped, whole(gate_up), whole(down), whole(gate_up_bias),
                                 whole(down_bias), activation, bf16)
                       : experts_quantized(rows, names, weights, dropped, gate_up, *gate_up_scales, down, *down_scales,
                                           whole(gate_up_bias), whole(down_bias), activation, hidden, bits, group, bf16);
  if (!shared.empty()) {
    Tensor beside = feed_forward(rows, shared, shared_scales, shared_bits, shared_group, activation);
    if (shared_gate.has_value()) {
      const Tensor open = shared_gate_scales.has_value()
                              ? linears(rows, {*shared_gate}, {*shared_gate_scales}, {}, gate_bits, gate_group)[0]
                              : torchs("aten::linear", "", rows, *shared_gate, MaybeTensor());
      beside = torchs("aten::mul", "Tensor", beside, torchs("aten::sigmoid", "", open));
    }
    y = added(y, beside, 1);
  }
  return {added(x, y, residual_scale), logits, scores, names, weights};
}

// x (..., D) -> x + residual_scale · a dense network of the normed x; its weights are gate_up and down.
Tensor feed_forward_layer(Tensor x, Tensor norm, double norm_eps, Tensors weights, Tensors scales, int64_t bits,
                          int64_t group, std::string activation, double residual_scale) {
  x = whole(x);
  const Tensor y = feed_forward(normed(x, norm, norm_eps), weights, scales, bits, group, activation);
  return added(x, y, residual_scale);
}

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) {
  m.def(
      "attend_layer(Tensor x, Tensor norm, float norm_eps, Tensor[] weights, Tensor[] scales, Tensor[] biases, "
      "Tensor? o_bias, int bits, int group, Tensor? q_norm, Tensor? k_norm, float eps, bool whole_norm, Tensor cos, "
      "Tensor sin, bool adjacent, Tensor(a!)[] keys, Tensor(b!)[] values, int[] lengths, int window, float scale, "
      "Tensor? sinks, float residual_scale) -> Tensor");
  m.def(
      "moe_layer(Tensor x, Tensor norm, float norm_eps, Tensor router, Tensor? router_bias, Tensor? balance_bias, "
      "Tensor? chosen, Tensor? dropped, bool sigmoids, int groups, int top_groups, bool two_best, int top_k, "
      "bool normalize, float route_scale, Tensor gate_up, Tensor? gate_up_scales, Tensor down, Tensor? down_scales, "
      "Tensor? gate_up_bias, Tensor? down_bias, str activation, int hidden, int bits, int group, Tensor[] shared, "
      "Tensor[] shared_scales, int shared_bits, int shared_group, Tensor? shared_gate, Tensor? shared_gate_scales, "
      "int gate_bits, int gate_group, float residual_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "feed_forward_layer(Tensor x, Tensor norm, float norm_eps, Tensor[] weights, Tensor[] scales, int bits, int group, "
      "str activation, float residual_scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) {
  m.impl("attend_layer", TORCH_BOX(&attend_layer));
  m.impl("moe_layer", TORCH_BOX(&moe_layer));
  m.impl("feed_forward_layer", TORCH_BOX(&feed_forward_layer));
}

}  // namespace handful
