// What decoding does beside its matrices: RMSNorm, and one token's attention with its norms, its rotation and its place
// in the cache, each as one operation. Through torch they would be some thirty for every layer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <xmmintrin.h>

#include <algorithm>
#include <vector>

#include "experts_call.h"
#include "operations.h"
#include "runtime.h"

namespace handful {
namespace {

constexpr double kRowCost = 0.5;  // nanoseconds for each number of a row that is read and written

const char* data_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

// One vector of a norm's weights, for rows of `width`.
const char* norm_weight(const MaybeTensor& weight, int64_t width, const char* name, Type& type) {
  if (!weight.has_value()) return nullptr;
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == width && weight->is_contiguous(), name, " does not fit");
  type = float_type(*weight, name);
  return data_of(*weight);
}

struct Rotation {
  const float* cos;
  const float* sin;
  int64_t half;  // pairs of a head
  bool adjacent;

  // Adjacent pairs come out as two halves, as in positions.py.
  void turn(float* head, float* scratch) const {
    for (int64_t i = 0; i < half; ++i) {
      const float first = head[adjacent ? 2 * i : i], second = head[adjacent ? 2 * i + 1 : i + half];
      scratch[i] = first * cos[i] - second * sin[i];
      scratch[i + half] = second * cos[i] + first * sin[i];
    }
    std::copy(scratch, scratch + 2 * half, head);
  }
};

// One sequence's keys and values, of one layer.
struct Past {
  char* keys;
  char* values;
  int64_t room, length;  // in tokens
  int64_t cache;         // which of the given ones it lies in

  // Tokens that the next one looks at, itself included.
  int64_t count(int64_t window) const { return window > 0 ? std::min(window, length + 1) : length + 1; }
};

}  // namespace

// x (..., D) of float32 or bfloat16 -> the same
Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "x is not contiguous");
  const Type type = float_type(x, "x");
  const int64_t width = x.size(x.dim() - 1);
  Type weight_type{};
  const char* scale = norm_weight(weight, width, "weight", weight_type);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const char* from = data_of(x);
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t rows = x.numel() / width, bytes = width * bytes_of(type), some = std::max<int64_t>(1, 16384 / width);
  each((rows + some - 1) / some, kRowCost * static_cast<double>(width * some), [&](int64_t i) {
    const Buffer buffer(width * 4);
    float* row = buffer.as<float>();
    for (int64_t r = i * some; r < std::min(rows, (i + 1) * some); ++r) {
      gemv().to_float(row, from + r * bytes, type, width);
      gemv().normalize(row, row, scale, weight_type, static_cast<float>(eps), width);
      gemv().from_float(to + r * bytes, row, type, width);
    }
  });
  return y;
}

// The place of the largest of a vector of logits (V): the first of equals; a NaN is above all numbers, as it is to torch.
int64_t argmax(Tensor logits) {
  STD_TORCH_CHECK(logits.dim() == 1 && logits.is_contiguous() && logits.size(0) >= 1, "logits is not a contiguous vector");
  const Type type = float_type(logits, "logits");
  constexpr int64_t kSome = 1024;
  alignas(64) float some[kSome];
  int64_t place = 0;
  float best = 0;
  for (int64_t first = 0; first < logits.size(0); first += kSome) {
    const int64_t count = std::min(kSome, logits.size(0) - first), whole = (count + 15) / 16 * 16;
    gemv().to_float(some, data_of(logits) + first * bytes_of(type), type, count);
    std::fill(some + count, some + whole, some[0]);
    __m128 most[4] = {_mm_load_ps(some), _mm_load_ps(some), _mm_load_ps(some), _mm_load_ps(some)};
    __m128 strange = _mm_cmpunord_ps(most[0], most[0]);
    for (int64_t i = 0; i < whole; i += 16) {
      for (int j = 0; j < 4; ++j) {
        const __m128 x = _mm_load_ps(some + i + 4 * j);
        most[j] = _mm_max_ps(x, most[j]);
        strange = _mm_or_ps(strange, _mm_cmpunord_ps(x, x));
      }
    }
    const __m128 top = _mm_max_ps(_mm_max_ps(most[0], most[1]), _mm_max_ps(most[2], most[3]));
    // Most of the parts have nothing that is above all before them, and are not looked at again.
    if (first > 0 && _mm_movemask_ps(_mm_or_ps(strange, _mm_cmpgt_ps(top, _mm_set1_ps(best)))) == 0) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (some[i] != some[i]) return first + i;
      if ((first == 0 && i == 0) || some[i] > best) {
        best = some[i];
        place = first + i;
      }
    }
  }
  return place;
}

// The next token of each of B sequences: q (B, H·d), k and v (B, J·d) before norm and rotation. The sequences lie in
// several caches, in order: keys and values (b, J, C, d) of each, for b sequences that hold `lengths` tokens, and whose
// new one is turned by its row of cos and sin (..., r/2). -> (B, H·d)
Tensor decode_attention(Tensor q, Tensor k, Tensor v, MaybeTensor q_norm, MaybeTensor k_norm, double eps, bool whole_norm,
                  Tensor cos, Tensor sin, bool adjacent, std::vector<Tensor> keys, std::vector<Tensor> values,
                  std::vector<int64_t> lengths, int64_t window, double scale, MaybeTensor sinks) {
  const auto caches = static_cast<int64_t>(keys.size());
  STD_TORCH_CHECK(caches >= 1 && keys.size() == values.size() && keys.size() == lengths.size(),
                  "keys, values and lengths are not of the same caches");
  const Type type = float_type(q, "q"), held = float_type(keys[0], "keys");
  STD_TORCH_CHECK(float_type(k, "k") == type && float_type(v, "v") == type, "q, k and v are not of one dtype");
  STD_TORCH_CHECK(q.dim() == 2 && k.dim() == 2 && v.dim() == 2 && keys[0].dim() == 4 && q.is_contiguous() &&
                      k.is_contiguous() && v.is_contiguous(),
                  "q, k, v are not contiguous (batch, heads · width), keys (batch, heads, room, width)");
  const int64_t B = q.size(0), J = keys[0].size(1), d = keys[0].size(3);
  const int64_t H = d > 0 ? q.size(1) / d : 0, group = J > 0 ? H / J : 0;
  STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && q.size(1) == group * J * d && group >= 1 && k.size(1) == J * d &&
                      v.size(1) == J * d,
                  "q, k and v do not fit keys (batch, heads, room, width)");
  const int64_t half = cos.numel() / caches;
  STD_TORCH_CHECK(cos.dim() >= 1 && cos.size(cos.dim() - 1) == half && cos.numel() == caches * half &&
                      sin.dim() >= 1 && sin.size(sin.dim() - 1) == half && sin.numel() == caches * half && 2 * half <= d &&
                      cos.is_contiguous() && sin.is_contiguous() && float_type(cos, "cos") == Type::kFloat32 &&
                      float_type(sin, "sin") == Type::kFloat32,
                  "cos and sin are not float32 (caches, at most half a head)");
  std::vector<Past> pasts;
  for (int64_t c = 0; c < caches; ++c) {
    const Tensor &key = keys[c], &value = values[c];
    STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4 && key.size(1) == J && key.size(3) == d && key.is_contiguous() &&
                        value.is_contiguous() && float_type(key, "keys") == held && float_type(value, "values") == held,
                    "keys and values are not contiguous (batch, heads, room, width) of one dtype");
    const int64_t room = key.size(2), length = lengths[c];
    STD_TORCH_CHECK(value.size(0) == key.size(0) && value.size(1) == J && value.size(2) == room && value.size(3) == d,
                    "values have another shape than keys");
    STD_TORCH_CHECK(0 <= length && length < room, "length is not from 0 to the cache's room");
    const int64_t step = J * room * d * bytes_of(held);
    for (int64_t b = 0; b < key.size(0); ++b) {
      pasts.push_back({static_cast<char*>(key.mutable_data_ptr()) + b * step,
                       static_cast<char*>(value.mutable_data_ptr()) + b * step, room, length, c});
    }
  }
  STD_TORCH_CHECK(static_cast<int64_t>(pasts.size()) == B, "keys are not of as many sequences as q");
  Type q_type{}, k_type{};
  const char* q_scale = norm_weight(q_norm, whole_norm ? H * d : d, "q_norm", q_type);
  const char* k_scale = norm_weight(k_norm, whole_norm ? J * d : d, "k_norm", k_type);
  const Buffer sink_buffer(H * 4);
  if (sinks.has_value()) {
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == H && sinks->is_contiguous(), "sinks are not one for each head");
    gemv().to_float(sink_buffer.as<float>(), data_of(*sinks), float_type(*sinks, "sinks"), H);
  }

  Tensor out = torch::stable::empty_like(q);
  const Buffer q_buffer(B * H * d * 4), out_buffer(B * H * d * 4);
  const int64_t bytes = d * bytes_of(held);
  each(B, kRowCost * static_cast<double>((H + 2 * J) * d), [&](int64_t b) {
    const Past& past = pasts[b];
    const Rotation rotation = {reinterpret_cast<const float*>(data_of(cos)) + past.cache * half,
                               reinterpret_cast<const float*>(data_of(sin)) + past.cache * half, half, adjacent};
    const Buffer row_buffer((J + 1) * d * 4);
    float *row = row_buffer.as<float>(), *scratch = row + J * d;
    const auto normed = [&](float* rows, int64_t heads, const char* weight, Type of) {
      if (weight != nullptr && whole_norm) {
        gemv().normalize(rows, rows, weight, of, static_cast<float>(eps), heads * d);
      }
      for (int64_t h = 0; h < heads; ++h) {
        float* head = rows + h * d;
        if (weight != nullptr && !whole_norm) gemv().normalize(head, head, weight, of, static_cast<float>(eps), d);
        rotation.turn(head, scratch);
      }
    };
    const auto hold = [&](char* to) {
      for (int64_t j = 0; j < J; ++j) gemv().from_float(to + (j * past.room + past.length) * bytes, row + j * d, held, d);
    };
    float* queries = q_buffer.as<float>() + b * H * d;
    gemv().to_float(queries, data_of(q) + b * H * d * bytes_of(type), type, H * d);
    normed(queries, H, q_scale, q_type);
    gemv().to_float(row, data_of(k) + b * J * d * bytes_of(type), type, J * d);
    normed(row, J, k_scale, k_type);
    hold(past.keys);
    gemv().to_float(row, data_of(v) + b * J * d * bytes_of(type), type, J * d);
    hold(past.values);
  });
  char* to = static_cast<char*>(out.mutable_data_ptr());
  double looked_at = 0;
  for (const Past& past : pasts) looked_at += static_cast<double>(past.count(window));
  each(B * J, kRowCost * 2 * looked_at / static_cast<double>(B) * static_cast<double>(d * group), [&](int64_t i) {
    const Past& past = pasts[i / J];
    const int64_t count = past.count(window), from = (i % J * past.room + past.length + 1 - count) * bytes;
    const int64_t heads = i / J * H + i % J * group;
    const Buffer scores(group * count * 4);
    float* answers = out_buffer.as<float>() + heads * d;
    const float* sink = sinks.has_value() ? sink_buffer.as<float>() + i % J * group : nullptr;
    gemv().attend({q_buffer.as<float>() + heads * d, group, d, d, past.keys + from, past.values + from, held, bytes,
                     bytes, count, static_cast<float>(scale), sink, scores.as<float>(), answers});
    gemv().from_float(to + heads * d * bytes_of(type), answers, type, group * d);
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("argmax(Tensor logits) -> int");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, bool whole_norm, Tensor cos, "
      "Tensor sin, bool adjacent, Tensor(a!)[] keys, Tensor(b!)[] values, int[] lengths, int window, float scale, "
      "Tensor? sinks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("argmax", TORCH_BOX(&argmax));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace handful
