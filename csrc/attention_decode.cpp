// Attention of one new token of each sequence, with its norms, its rotation and its place in the cache, as one
// operation. Through torch it would be some thirty for every layer.
#include <algorithm>

#include "operations.h"
#include "runtime.h"
#include "weights.h"

namespace handful {
namespace {

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
struct Sequence {
  char* keys;
  char* values;
  int64_t room, length;  // in tokens
  int64_t cache;         // which of the caches it lies in

  // Tokens that the next one sees, itself included.
  int64_t seen(int64_t window) const { return window > 0 ? std::min(window, length + 1) : length + 1; }
};

// Of B sequences, whose keys and values are of J heads of width d.
std::vector<Sequence> sequences_of(const Caches& caches, int64_t B, int64_t J, int64_t d, Type type) {
  std::vector<Sequence> sequences;
  for (size_t c = 0; c < caches.keys.size(); ++c) {
    const Tensor &key = caches.keys[c], &value = caches.values[c];
    STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4 && key.size(1) == J && key.size(3) == d && key.is_contiguous() &&
                        value.is_contiguous() && float_type(key, "keys") == type && float_type(value, "values") == type,
                    "keys and values are not contiguous (batch, heads, room, width) of one dtype");
    const int64_t room = key.size(2), length = caches.lengths[c];
    STD_TORCH_CHECK(value.size(0) == key.size(0) && value.size(1) == J && value.size(2) == room && value.size(3) == d,
                    "values have another shape than keys");
    STD_TORCH_CHECK(0 <= length && length < room, "length is not from 0 to the cache's room");
    const int64_t step = J * room * d * bytes_of(type);
    for (int64_t b = 0; b < key.size(0); ++b) {
      sequences.push_back({static_cast<char*>(key.mutable_data_ptr()) + b * step,
                           static_cast<char*>(value.mutable_data_ptr()) + b * step, room, length,
                           static_cast<int64_t>(c)});
    }
  }
  STD_TORCH_CHECK(static_cast<int64_t>(sequences.size()) == B, "keys are not of as many sequences as q");
  return sequences;
}

// Rounds a row, as an operation rounds its result.
void round_to(Type type, float* row, int64_t count, float* scratch) {
  if (type == Type::kFloat32) return;
  gemv().from_float(reinterpret_cast<char*>(scratch), row, type, count);
  gemv().to_float(row, reinterpret_cast<const char*>(scratch), type, count);
}

}  // namespace

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const DecodeAttention& attention) {
  const HeadNorms& norms = attention.norms;
  const Rope& rope = attention.rope;
  const Caches& caches = attention.caches;
  const MaybeTensor& sinks = attention.sinks;
  const int64_t window = attention.window;
  const auto count = static_cast<int64_t>(caches.keys.size());
  STD_TORCH_CHECK(count >= 1 && caches.values.size() == caches.keys.size() &&
                      caches.lengths.size() == caches.keys.size(),
                  "keys, values and lengths are not of the same caches");
  const Type type = float_type(q, "q"), cached = float_type(caches.keys[0], "keys");
  STD_TORCH_CHECK(float_type(k, "k") == type && float_type(v, "v") == type, "q, k and v are not of one dtype");
  STD_TORCH_CHECK(q.dim() == 2 && k.dim() == 2 && v.dim() == 2 && caches.keys[0].dim() == 4 && q.is_contiguous() &&
                      k.is_contiguous() && v.is_contiguous(),
                  "q, k, v are not contiguous (batch, heads · width), keys (batch, heads, room, width)");
  const int64_t B = q.size(0), J = caches.keys[0].size(1), d = caches.keys[0].size(3);
  const int64_t H = d > 0 ? q.size(1) / d : 0, group = J > 0 ? H / J : 0;
  STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && q.size(1) == group * J * d && group >= 1 && k.size(1) == J * d &&
                      v.size(1) == J * d,
                  "q, k and v do not fit keys (batch, heads, room, width)");
  const int64_t half = rope.cos.numel() / count;
  const auto fits = [&](const Tensor& turns, const char* name) {
    return turns.dim() >= 1 && turns.size(turns.dim() - 1) == half && turns.numel() == count * half &&
           turns.is_contiguous() && float_type(turns, name) == Type::kFloat32;
  };
  STD_TORCH_CHECK(2 * half <= d && fits(rope.cos, "cos") && fits(rope.sin, "sin"),
                  "cos and sin are not float32 (caches, at most half a head)");
  const std::vector<Sequence> sequences = sequences_of(caches, B, J, d, cached);
  const NormWeight q_norm = norm_weight(norms.q, norms.whole ? H * d : d, "q_norm");
  const NormWeight k_norm = norm_weight(norms.k, norms.whole ? J * d : d, "k_norm");
  const Buffer sink_buffer(H * 4);
  if (sinks.has_value()) {
    STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == H && sinks->is_contiguous(),
                    "sinks are not one for each head");
    gemv().to_float(sink_buffer.as<float>(), data_of(*sinks), float_type(*sinks, "sinks"), H);
  }

  Tensor out = torch::stable::empty_like(q);
  const Buffer q_buffer(B * H * d * 4), out_buffer(B * H * d * 4);
  const int64_t bytes = d * bytes_of(cached);
  each(B, kRowCost * static_cast<double>((H + 2 * J) * d), [&](int64_t b) {
    const Sequence& own = sequences[b];
    const int64_t at = own.cache * half;
    const Rotation rotation = {rope.cos.const_data_ptr<float>() + at, rope.sin.const_data_ptr<float>() + at, half,
                               rope.adjacent};
    const Buffer row_buffer((J + 1) * d * 4);
    float *row = row_buffer.as<float>(), *scratch = row + J * d;
    const auto norm_and_turn = [&](float* rows, int64_t heads, const NormWeight& weight) {
      const int64_t width = norms.whole ? heads * d : d;
      for (float* some = rows; weight.data != nullptr && some < rows + heads * d; some += width) {
        gemv().normalize(some, some, weight.data, weight.type, static_cast<float>(norms.eps), width);
      }
      for (float* head = rows; head < rows + heads * d; head += d) {
        if (weight.data != nullptr) round_to(type, head, d, scratch);
        rotation.turn(head, scratch);
      }
    };
    const auto append = [&](char* to) {
      for (int64_t j = 0; j < J; ++j) {
        gemv().from_float(to + (j * own.room + own.length) * bytes, row + j * d, cached, d);
      }
    };
    float* queries = q_buffer.as<float>() + b * H * d;
    gemv().to_float(queries, data_of(q) + b * H * d * bytes_of(type), type, H * d);
    norm_and_turn(queries, H, q_norm);
    gemv().to_float(row, data_of(k) + b * J * d * bytes_of(type), type, J * d);
    norm_and_turn(row, J, k_norm);
    append(own.keys);
    gemv().to_float(row, data_of(v) + b * J * d * bytes_of(type), type, J * d);
    append(own.values);
  });
  char* to = static_cast<char*>(out.mutable_data_ptr());
  double seen = 0;
  for (const Sequence& sequence : sequences) seen += static_cast<double>(sequence.seen(window));
  each(B * J, kRowCost * 2 * seen / static_cast<double>(B) * static_cast<double>(d * group), [&](int64_t i) {
    const Sequence& own = sequences[i / J];
    const int64_t keys = own.seen(window), from = (i % J * own.room + own.length + 1 - keys) * bytes;
    const int64_t heads = i / J * H + i % J * group;
    const Buffer scores(group * keys * 4);
    float* answers = out_buffer.as<float>() + heads * d;
    const float* sink = sinks.has_value() ? sink_buffer.as<float>() + i % J * group : nullptr;
    gemv().attend({q_buffer.as<float>() + heads * d, group, d, d, own.keys + from, own.values + from, cached, bytes,
                   bytes, keys, static_cast<float>(attention.scale), sink, scores.as<float>(), answers});
    gemv().from_float(to + heads * d * bytes_of(type), answers, type, group * d);
  });
  return out;
}

namespace {

Tensor decode_attention_op(Tensor q, Tensor k, Tensor v, MaybeTensor q_norm, MaybeTensor k_norm, double eps,
                           bool whole_norm, Tensor cos, Tensor sin, bool adjacent, Tensors keys, Tensors values,
                           std::vector<int64_t> lengths, int64_t window, double scale, MaybeTensor sinks) {
  return decode_attention(q, k, v, {{q_norm, k_norm, eps, whole_norm}, {cos, sin, adjacent}, {keys, values, lengths},
                                    window, scale, sinks});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps, bool whole_norm, "
      "Tensor cos, Tensor sin, bool adjacent, Tensor(a!)[] keys, Tensor(b!)[] values, int[] lengths, int window, "
      "float scale, Tensor? sinks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention_op)); }

}  // namespace handful
