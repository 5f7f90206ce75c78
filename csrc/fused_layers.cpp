// A layer of few tokens as two operations: attention, and the dense network or the mixture, each with the norm before
// it and the sum after it; and a whole decoding step, tokens to logits, as one. They call the separate operations'
// functions and round as those do: the bits are the same.
#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "operations.h"
#include "runtime.h"
#include "weights.h"

namespace handful {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor whole(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensors whole(const Tensors& all) {
  Tensors found;
  for (const Tensor& t : all) found.push_back(whole(t));
  return found;
}

MaybeTensor whole(const MaybeTensor& t) { return t.has_value() ? MaybeTensor(whole(*t)) : t; }

Tensors list_of(const MaybeTensor& t) { return t.has_value() ? Tensors{*t} : Tensors(); }

// Maps `first` up to `end`, with biases of their own.
LinearMaps part(const LinearMaps& maps, int64_t first, int64_t end, const Tensors& biases) {
  const auto cut = [&](const Tensors& all) {
    return all.empty() ? all : Tensors(all.begin() + first, all.begin() + end);
  };
  return {whole(cut(maps.weights)), cut(maps.scales), whole(biases), maps.bits, maps.group};
}

// An operation of torch's own, whose bits no kernel of ours has.
template <class... Given>
Tensor torch_op(const char* name, const char* overload, const Given&... given) {
  std::array<StableIValue, sizeof...(given)> stack{from(given)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// x (..., D), normed, as rows (T, D).
Tensor norm_rows(const Tensor& x, const Norm& norm) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) >= 1, "x has no width");
  return rms_norm(x, norm, true);
}

// x + scale · y in x's shape and type. scale · y is rounded first, as torch does it.
Tensor add_scaled(const Tensor& x, const Tensor& y, double scale) {
  const Type type = float_type(x, "x");
  STD_TORCH_CHECK(float_type(y, "y") == type && y.numel() == x.numel() && y.is_contiguous(), "y does not fit x");
  Tensor out = fresh_like(x);
  const char *left = data_of(x), *right = data_of(y);
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

// The activation by torch, as in experts/reference.py: h (T, G) -> (T, F).
Tensor activate(const Tensor& h, const std::string& activation) {
  const std::string exact = "none";
  if (activation == "relu") return torch_op("aten::relu", "", h);
  if (activation == "gelu") return torch_op("aten::gelu", "", h, exact);
  STD_TORCH_CHECK(activation == "swiglu" || activation == "geglu", "activation = '", activation,
                  "': one of swiglu, geglu, gelu, relu");
  const int64_t hidden = h.size(1) / 2;
  Tensor all = h;
  const Tensor gate = torch::stable::narrow(all, 1, 0, hidden), up = torch::stable::narrow(all, 1, hidden, hidden);
  const bool silu = activation == "swiglu";
  const Tensor open = silu ? torch_op("aten::silu", "", gate) : torch_op("aten::gelu", "", gate, exact);
  return torch_op("aten::mul", "Tensor", open, up);
}

// A dense network: gate_up (G, D) and down (D, F).
struct FeedForward {
  LinearMaps maps;
  std::string activation;
};

// x (T, D) -> (T, D)
Tensor feed_forward(const Tensor& x, const FeedForward& network) {
  const LinearMaps& maps = network.maps;
  STD_TORCH_CHECK(maps.weights.size() == 2 && (maps.scales.empty() || maps.scales.size() == 2),
                  "weights are not gate_up and down");
  const Tensor h = linears(x, part(maps, 0, 1, {}))[0];
  return linears(activate(h, network.activation), part(maps, 1, 2, {}))[0];
}

// Experts that every token uses. Their output is multiplied by the sigmoid of the gate, a map to one number, if there
// is one; torch multiplies a gate of floats.
struct SharedExperts {
  FeedForward network;
  LinearMaps gate;
};

// x (T, D) -> (T, D)
Tensor shared_experts(const Tensor& x, const SharedExperts& shared) {
  const Tensor y = feed_forward(x, shared.network);
  const LinearMaps& gate = shared.gate;
  if (gate.weights.empty()) return y;
  const Tensor open = gate.scales.empty() ? torch_op("aten::linear", "", x, gate.weights[0], MaybeTensor())
                                          : linears(x, gate)[0];
  return torch_op("aten::mul", "Tensor", y, torch_op("aten::sigmoid", "", open));
}

// What the halves of a layer are given beside x, in the order of their operations' schemas.

// Attention's: `weights` and `scales` are of q, k, v and o; `biases` of q, k and v, or of none.
struct AttentionHalf {
  Tensor norm;
  double norm_eps;
  Tensors weights, scales, biases;
  MaybeTensor o_bias;
  int64_t bits, group;
  MaybeTensor q_norm, k_norm;
  double eps;
  bool whole_norm, adjacent;
  int64_t window;
  double scale;
  MaybeTensor sinks;
  double residual_scale;
};

struct MixtureHalf {
  Tensor norm;
  double norm_eps;
  Tensor router;
  MaybeTensor router_bias, balance_bias, chosen, dropped;
  RouterRules rules;
  ExpertsWeights experts;
  LinearMaps shared, gate;
  double residual_scale;
};

struct DenseHalf {
  Tensor norm;
  double norm_eps;
  LinearMaps maps;  // gate_up and down
  std::string activation;
  double residual_scale;
};

// x (..., D) -> x + residual_scale · attention of the normed x, of one new token of each sequence.
Tensor attend(Tensor x, const AttentionHalf& half, const Tensor& cos, const Tensor& sin, Caches caches) {
  const LinearMaps maps = {half.weights, half.scales, {}, half.bits, half.group};
  const DecodeAttention attention = {{half.q_norm, half.k_norm, half.eps, half.whole_norm}, {cos, sin, half.adjacent},
                                     std::move(caches), half.window, half.scale, half.sinks};
  STD_TORCH_CHECK(maps.weights.size() == 4 && (maps.scales.empty() || maps.scales.size() == 4),
                  "weights are not of q, k, v and o");

  x = whole(x);
  const Tensors qkv = linears(norm_rows(x, {half.norm, half.norm_eps}), part(maps, 0, 3, half.biases));
  const Tensor answer = decode_attention(qkv[0], qkv[1], qkv[2], attention);
  const Tensor y = linears(answer, part(maps, 3, 4, list_of(half.o_bias)))[0];
  return add_scaled(x, y, half.residual_scale);
}

// x (..., D) -> x + residual_scale · the mixture of the normed x; and what `route` gives.
std::pair<Tensor, Routed> mix(Tensor x, const MixtureHalf& half) {
  const Router routing = {whole(half.router), half.router_bias, half.balance_bias, half.chosen, half.rules};
  const ExpertsWeights& given = half.experts;
  const bool codes = given.bits != 0;
  const ExpertsWeights routed = {codes ? given.gate_up : whole(given.gate_up), given.gate_up_scales,
                                 codes ? given.down : whole(given.down), given.down_scales,
                                 whole(given.gate_up_bias), whole(given.down_bias), given.activation, given.hidden,
                                 given.bits, given.group};
  STD_TORCH_CHECK(!codes || (given.gate_up_scales.has_value() && given.down_scales.has_value()),
                  "codes have no scales");

  x = whole(x);
  const Tensor rows = norm_rows(x, {half.norm, half.norm_eps});
  Routed found = route(rows, routing);
  const bool bf16 = float_type(x, "x") == Type::kBFloat16;
  Tensor y = experts(rows, {found.experts, found.weights, half.dropped}, routed, bf16);
  if (!half.shared.weights.empty()) {
    y = add_scaled(y, shared_experts(rows, {{half.shared, given.activation}, half.gate}), 1);
  }
  return {add_scaled(x, y, half.residual_scale), std::move(found)};
}

// x (..., D) -> x + residual_scale · a dense network of the normed x.
Tensor feed(Tensor x, const DenseHalf& half) {
  x = whole(x);
  const Tensor rows = norm_rows(x, {half.norm, half.norm_eps});
  return add_scaled(x, feed_forward(rows, {half.maps, half.activation}), half.residual_scale);
}

Tensor attend_layer(Tensor x, Tensor norm, double norm_eps, Tensors weights, Tensors scales, Tensors biases,
                    MaybeTensor o_bias, int64_t bits, int64_t group, MaybeTensor q_norm, MaybeTensor k_norm, double eps,
                    bool whole_norm, Tensor cos, Tensor sin, bool adjacent, Tensors keys, Tensors values,
                    std::vector<int64_t> lengths, int64_t window, double scale, MaybeTensor sinks,
                    double residual_scale) {
  return attend(x, {norm, norm_eps, weights, scales, biases, o_bias, bits, group, q_norm, k_norm, eps, whole_norm,
                    adjacent, window, scale, sinks, residual_scale},
                cos, sin, {std::move(keys), std::move(values), std::move(lengths)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_layer(
    Tensor x, Tensor norm, double norm_eps, Tensor router, MaybeTensor router_bias, MaybeTensor balance_bias,
    MaybeTensor chosen, MaybeTensor dropped, bool sigmoids, int64_t groups, int64_t top_groups, bool two_best,
    int64_t top_k, bool normalize, double route_scale, Tensor gate_up, MaybeTensor gate_up_scales, Tensor down,
    MaybeTensor down_scales, MaybeTensor gate_up_bias, MaybeTensor down_bias, std::string activation, int64_t hidden,
    int64_t bits, int64_t group, Tensors shared, Tensors shared_scales, int64_t shared_bits, int64_t shared_group,
    MaybeTensor shared_gate, MaybeTensor shared_gate_scales, int64_t gate_bits, int64_t gate_group,
    double residual_scale) {
  const auto [y, found] = mix(
      x, {norm, norm_eps, router, router_bias, balance_bias, chosen, dropped,
          {sigmoids, groups, top_groups, two_best, top_k, normalize, route_scale},
          {gate_up, gate_up_scales, down, down_scales, gate_up_bias, down_bias, activation, hidden, bits, group},
          {shared, shared_scales, {}, shared_bits, shared_group},
          {list_of(shared_gate), list_of(shared_gate_scales), {}, gate_bits, gate_group}, residual_scale});
  return {y, found.logits, found.scores, found.experts, found.weights};
}

// `weights` are gate_up and down.
Tensor feed_forward_layer(Tensor x, Tensor norm, double norm_eps, Tensors weights, Tensors scales, int64_t bits,
                          int64_t group, std::string activation, double residual_scale) {
  return feed(x, {norm, norm_eps, {weights, scales, {}, bits, group}, activation, residual_scale});
}

// The operands of many operations, one after the other: numbers as they are, of a tensor whether it is there (1 or 0),
// of a list or a text first how long it is; and the tensors themselves.
class Operands {
 public:
  Operands(const Tensors& tensors, const Tensor& numbers)
      : tensors_(tensors), numbers_(numbers.const_data_ptr<double>()), count_(numbers.numel()) {}

  double number() {
    STD_TORCH_CHECK(next_ < count_, "operands end too early");
    return numbers_[next_++];
  }
  int64_t integer() { return static_cast<int64_t>(number()); }
  bool flag() { return number() != 0; }
  std::string text() {
    std::string found;
    for (int64_t left = integer(); left > 0; --left) found += static_cast<char>(integer());
    return found;
  }
  Tensor tensor() {
    STD_TORCH_CHECK(number() == 1 && next_tensor_ < tensors_.size(), "operands lack a tensor");
    return tensors_[next_tensor_++];
  }
  MaybeTensor maybe() { return next_ < count_ && numbers_[next_] == 0 ? (++next_, MaybeTensor()) : tensor(); }
  Tensors list() {
    Tensors found;
    for (int64_t left = integer(); left > 0; --left) found.push_back(tensor());
    return found;
  }

  bool done() const { return next_ == count_ && next_tensor_ == tensors_.size(); }

 private:
  const Tensors& tensors_;
  const double* numbers_;
  int64_t count_, next_ = 0;
  size_t next_tensor_ = 0;
};

// What stands in braces is read in its order.
LinearMaps maps_of(Operands& next) { return {next.list(), next.list(), {}, next.integer(), next.integer()}; }

// A map to one number, or none.
LinearMaps gate_of(Operands& next) {
  return {list_of(next.maybe()), list_of(next.maybe()), {}, next.integer(), next.integer()};
}

AttentionHalf attention_half(Operands& next) {
  return {next.tensor(), next.number(),  next.list(),  next.list(),    next.list(), next.maybe(),
          next.integer(), next.integer(), next.maybe(), next.maybe(),   next.number(), next.flag(),
          next.flag(),    next.integer(), next.number(), next.maybe(), next.number()};
}

MixtureHalf mixture_half(Operands& next) {
  return {next.tensor(),
          next.number(),
          next.tensor(),
          next.maybe(),
          next.maybe(),
          next.maybe(),
          next.maybe(),
          {next.flag(), next.integer(), next.integer(), next.flag(), next.integer(), next.flag(), next.number()},
          {next.tensor(), next.maybe(), next.tensor(), next.maybe(), next.maybe(), next.maybe(), next.text(),
           next.integer(), next.integer(), next.integer()},
          maps_of(next),
          gate_of(next),
          next.number()};
}

DenseHalf dense_half(Operands& next) {
  return {next.tensor(), next.number(), maps_of(next), next.text(), next.number()};
}

// Rows of the embedding (V, D) for tokens (..., T): (T, D).
Tensor embed(const Tensor& tokens, const Tensor& embedding) {
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long && tokens.is_contiguous(),
                  "tokens are not contiguous and of type int64");
  STD_TORCH_CHECK(embedding.dim() == 2, "embedding is not a matrix (vocabulary, width)");
  const int64_t count = tokens.numel(), vocabulary = embedding.size(0), width = embedding.size(1);
  const int64_t bytes = width * bytes_of(float_type(embedding, "embedding"));
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const Tensor table = whole(embedding);
  Tensor x = fresh({count, width}, embedding.scalar_type());
  char* to = static_cast<char*>(x.mutable_data_ptr());
  for (int64_t t = 0; t < count; ++t) {
    STD_TORCH_CHECK(0 <= token[t] && token[t] < vocabulary, "token ", token[t], ": there are ", vocabulary,
                    ", counted from 0");
    std::memcpy(to + t * bytes, data_of(table) + token[t] * bytes, bytes);
  }
  return x;
}

// change(x) of every number, rounded to x's type.
template <class Change>
Tensor changed(const Tensor& x, const Change& change) {
  const Type type = float_type(x, "x");
  const Buffer buffer(x.numel() * 4);
  float* numbers = buffer.as<float>();
  gemv().to_float(numbers, data_of(x), type, x.numel());
  for (int64_t n = 0; n < x.numel(); ++n) numbers[n] = change(numbers[n]);
  Tensor y = fresh_like(x);
  gemv().from_float(static_cast<char*>(y.mutable_data_ptr()), numbers, type, x.numel());
  return y;
}

// A decoder's step: one new token of each of B sequences to its logits. `numbers` (float64) and `tensors`: what the
// embedding is multiplied by, and it; how many layers there are; of each the operands of `attend_layer` without those
// that change with every step, whether it is a mixture, and the operands of `moe_layer` or of `feed_forward_layer`; the
// norm's; what hidden values are divided by, and the map to logits. Keys, values and lengths: those of each layer's
// caches. Gives logits (B, V), and for each mixture what `route` gives.
Tensors decoder_step(Tensor tokens, Tensors tensors, Tensor numbers, Tensor cos, Tensor sin, Tensors keys,
                     Tensors values, std::vector<int64_t> lengths) {
  STD_TORCH_CHECK(numbers.dim() == 1 && numbers.is_contiguous() && numbers.scalar_type() == ScalarType::Double,
                  "numbers is not a contiguous vector of type float64");
  Operands next(tensors, numbers);
  const auto factor = static_cast<float>(next.number());
  Tensor x = embed(tokens, next.tensor());
  if (factor != 1) x = changed(x, [&](float value) { return value * factor; });
  const int64_t count = next.integer(), caches = count > 0 ? static_cast<int64_t>(keys.size()) / count : 0;
  STD_TORCH_CHECK(count >= 1 && static_cast<int64_t>(keys.size()) == count * caches && values.size() == keys.size() &&
                      lengths.size() == keys.size(),
                  "keys, values and lengths are not of the same caches");
  Tensors made(1);
  for (int64_t l = 0; l < count; ++l) {
    const auto own = [&](const auto& all) {
      return std::decay_t<decltype(all)>(all.begin() + l * caches, all.begin() + (l + 1) * caches);
    };
    x = attend(x, attention_half(next), cos, sin, {own(keys), own(values), own(lengths)});
    if (next.flag()) {
      const auto [y, found] = mix(x, mixture_half(next));
      x = y;
      made.insert(made.end(), {found.logits, found.scores, found.experts, found.weights});
    } else {
      x = feed(x, dense_half(next));
    }
  }
  const Norm norm = {next.tensor(), next.number()};
  const auto divisor = static_cast<float>(next.number());
  const LinearMaps head = maps_of(next);
  STD_TORCH_CHECK(next.done(), "operands are left over");
  STD_TORCH_CHECK(head.weights.size() == 1, "logits are not of one map");
  x = rms_norm(x, norm);
  if (divisor != 1) x = changed(x, [&](float value) { return value / divisor; });
  made[0] = linears(x, part(head, 0, 1, {}))[0];
  return made;
}

}  // namespace

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
      "feed_forward_layer(Tensor x, Tensor norm, float norm_eps, Tensor[] weights, Tensor[] scales, int bits, "
      "int group, str activation, float residual_scale) -> Tensor");
  m.def(
      "decoder_step(Tensor tokens, Tensor[] tensors, Tensor numbers, Tensor cos, Tensor sin, Tensor(a!)[] keys, "
      "Tensor(b!)[] values, int[] lengths) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) {
  m.impl("attend_layer", TORCH_BOX(&attend_layer));
  m.impl("moe_layer", TORCH_BOX(&moe_layer));
  m.impl("feed_forward_layer", TORCH_BOX(&feed_forward_layer));
  m.impl("decoder_step", TORCH_BOX(&decoder_step));
}

}  // namespace handful
