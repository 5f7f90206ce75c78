// Attention of one new token of each sequence, with its norms, its rotation and its place in the cache, as one
// operation. Through torch it would be some thirty for every layer.
#include <algorithm>
#include <cmath>

#include "operations.h"
#include "runtime.h"
#include "weights.h"

namespace handful {
namespace {

// Keys that an item of work takes: so many heads of so long contexts are enough for all threads.
constexpr int64_t kSplit = 8 * kKeyBlock;

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
  int64_t splits(int64_t window) const { return (seen(window) + kSplit - 1) / kSplit; }
};

// The type of rows of a cache for heads of width d.
Type cache_type(const Tensor& rows, int64_t d, const char* name) {
  const bool codes = rows.scalar_type() == ScalarType::Char;
  const Type type = codes ? Type::kInt8 : float_type(rows, name);
  const int64_t numbers = codes ? row_bytes(type, d) : d;
  STD_TORCH_CHECK(rows.dim() == 4 && rows.size(3) == numbers && rows.is_contiguous(), name,
                  " are not contiguous (batch, heads, room, ", numbers, ")");
  return type;
}

// Of B sequences, whose keys and values are of J heads of width d, and of one type.
std::vector<Sequence> sequences_of(const Caches& caches, int64_t B, int64_t J, int64_t d, Type type) {
  std::vector<Sequence> sequences;
  sequences.reserve(B);
  for (size_t c = 0; c < caches.keys.size(); ++c) {
    const Tensor &key = caches.keys[c], &value = caches.values[c];
    STD_TORCH_CHECK(cache_type(key, d, "keys") == type && cache_type(value, d, "values") == type && key.size(1) == J,
                    "keys and values are not of as many heads and of one dtype");
    const int64_t room = key.size(2), length = caches.lengths[c];
    STD_TORCH_CHECK(value.size(0) == key.size(0) && value.size(1) == J && value.size(2) == room,
                    "values have another shape than keys");
    STD_TORCH_CHECK(0 <= length && length < room, "length is not from 0 to the cache's room");
    const int64_t step = J * room * row_bytes(type, d);
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
  const Type type = float_type(q, "q");
  STD_TORCH_CHECK(float_type(k, "k") == type && float_type(v, "v") == type, "q, k and v are not of one dtype");
  STD_TORCH_CHECK(q.dim() == 2 && k.dim() == 2 && v.dim() == 2 && caches.keys[0].dim() == 4 && q.is_contiguous() &&
                      k.is_contiguous() && v.is_contiguous(),
                  "q, k, v are not contiguous (batch, heads · width), keys (batch, heads, room, width)");
  const int64_t B = q.size(0), J = caches.keys[0].size(1), d = J > 0 ? k.size(1) / J : 0;
  const int64_t H = d > 0 ? q.size(1) / d : 0, group = J > 0 ? H / J : 0;
  const Type cached = cache_type(caches.keys[0], d, "keys");
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

  Tensor out = fresh_like(q);
  const Buffer q_buffer(B * H * d * 4);
  const int64_t bytes = row_bytes(cached, d);
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
  // Every kSplit keys of a head are an item, whose results are joined after all: those of sequence b begin at
  // starts[b] * H, for each split one of every head. Numbers depend on the keys alone, not on who else is there.
  std::vector<int64_t> starts, owners;
  starts.reserve(B + 1);
  starts.push_back(0);
  owners.reserve(B);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t splits = sequences[b].splits(window);
    starts.push_back(starts[b] + splits);
    owners.insert(owners.end(), splits, b);
  }
  const int64_t parts = starts[B];
  const Buffer out_buffer(parts * H * d * 4), sums_buffer(2 * parts * H * 4);
  float *outs = out_buffer.as<float>(), *sums = sums_buffer.as<float>(), *largest = sums + parts * H;
  const double row = kRowCost * static_cast<double>(d * group);
  each(parts * J, 2 * row * kSplit, [&](int64_t i) {
    const int64_t part = i / J, j = i % J, b = owners[part];
    const Sequence& own = sequences[b];
    const int64_t seen = own.seen(window), done = (part - starts[b]) * kSplit;
    const int64_t from = (j * own.room + own.length + 1 - seen + done) * bytes, at = part * H + j * group;
    const Buffer scores(group * kKeyBlock * 4);
    gemv().attend({q_buffer.as<float>() + (b * H + j * group) * d, group, d, d, own.keys + from, own.values + from,
                   cached, bytes, bytes, std::min(kSplit, seen - done), static_cast<float>(attention.scale),
                   scores.as<float>(), largest + at, sums + at, outs + at * d});
  });
  char* to = static_cast<char*>(out.mutable_data_ptr());
  each(B * H, kRowCost * static_cast<double>(parts * d) / static_cast<double>(std::max<int64_t>(B, 1)), [&](int64_t i) {
    const int64_t b = i / H, h = i % H, first = starts[b] * H + h;
    const auto count = static_cast<int>(starts[b + 1] - starts[b]);
    Some<const float*> rows(count);
    Some<float> weights(count);
    float most = sinks.has_value() ? sink_buffer.as<float>()[h] : largest[first];
    for (int s = 0; s < count; ++s) most = std::max(most, largest[first + s * H]);
    float sum = sinks.has_value() ? std::exp(sink_buffer.as<float>()[h] - most) : 0.0f;
    for (int s = 0; s < count; ++s) {
      rows[s] = outs + (first + s * H) * d;
      weights[s] = std::exp(largest[first + s * H] - most);
      sum += weights[s] * sums[first + s * H];
    }
    for (int s = 0; s < count; ++s) weights[s] /= sum;
    gemv().combine(to + i * d * bytes_of(type), type, rows.data(), weights.data(), count, d);
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
