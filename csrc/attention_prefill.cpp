// Attention of many new tokens, softmax(scale · q · k) · v, in blocks of keys: no more than a block's scores is in
// memory (as in FlashAttention, Dao et al., arXiv:2205.14135).
//
// The queries of a key-value head's group are the columns (kernels.h), keys the rows of a left matrix as they lie, and
// the softmax's numerators the panels for the transposed values.
#include <algorithm>
#include <limits>

#include "gemm.h"

namespace handful {
namespace {

constexpr int kPanels = 8;  // panels of queries for a block of keys: scores and results stay in the cache
constexpr float kNothing = -1e30f;  // the largest score of no keys

// Vectors of one dtype as (B, heads, tokens, width), wherever they lie.
struct Heads {
  const char* data;
  int64_t batch, heads, tokens, width;
  int64_t strides[3];  // bytes

  Type type;

  // Of float type `floats`, or codes of rows of `coded` numbers.
  Heads(const Tensor& t, Type floats, const char* name, int64_t coded = 0)
      : data(static_cast<const char*>(t.const_data_ptr())) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(3) >= 1 && (t.stride(3) == 1 || t.size(3) == 1), name,
                    " is not (batch, heads, tokens, width) with whole rows");
    const bool codes = coded > 0 && t.scalar_type() == ScalarType::Char;
    type = codes ? Type::kInt8 : float_type(t, name);
    STD_TORCH_CHECK(codes || type == floats, name, " is not of q's dtype");
    STD_TORCH_CHECK(!codes || t.size(3) == row_bytes(type, coded), name, " is not of codes of ", coded, " numbers");
    batch = t.size(0), heads = t.size(1), tokens = t.size(2), width = codes ? coded : t.size(3);
    for (int i = 0; i < 3; ++i) strides[i] = t.stride(i) * (codes ? 1 : bytes_of(type));
  }

  const char* row(int64_t b, int64_t h, int64_t token) const {
    return data + b * strides[0] + h * strides[1] + token * strides[2];
  }
};

// `tokens` rows of a head from `first` on as a matrix of floats: as they lie, or in `unpacked`.
Matrix float_rows(const Heads& heads, int64_t b, int64_t h, int64_t first, int64_t tokens, Type type, char* unpacked) {
  if (heads.type == type) return {heads.row(b, h, first), type, heads.strides[2], nullptr, 0, 0};
  const int64_t stride = heads.width * bytes_of(type);
  const Buffer buffer(heads.width * 4);
  float* row = buffer.as<float>();
  for (int64_t t = 0; t < tokens; ++t) {
    gemv().to_float(row, heads.row(b, h, first + t), heads.type, heads.width);
    gemv().from_float(unpacked + t * stride, row, type, heads.width);
  }
  return {unpacked, type, stride, nullptr, 0, 0};
}

struct Job {
  Heads q, k, v;
  Type type;
  const float* sinks;  // of each head; null: none
  float scale;
  int64_t window;  // 0: none
  char* y;         // (B, S, H, width of v)
  const Gemm& gemm;

  int64_t group() const { return q.heads / k.heads; }  // queries of a token that share its key
  int64_t past() const { return k.tokens - q.tokens; }

  // Columns `first` up to `end` of a sequence's key-value head, `group` of a token.
  void run(int64_t b, int64_t j, int64_t first, int64_t end) const;
};

void Job::run(int64_t b, int64_t j, int64_t first, int64_t end) const {
  const int64_t G = group(), d = k.width, dv = v.width;
  const auto panels = static_cast<int>((end - first + kPanel - 1) / kPanel);
  const int64_t q_units = panel_units(d, gemm.values) * kPanel;
  const int64_t p_units = panel_units(kRows, gemm.values) * kPanel;
  const int64_t row_blocks = (dv + kRows - 1) / kRows, tile = int64_t{kRows} * kPanel;
  const Buffer buffer((panels * (q_units + p_units + row_blocks * tile + 3 * kPanel)) * 4);
  const bool codes = k.type == Type::kInt8;
  const Buffer unpacked(codes ? kRows * std::max(d, dv) * bytes_of(type) : 0);
  uint32_t* queries = buffer.as<uint32_t>();
  uint32_t* shares = queries + panels * q_units;
  float* results = reinterpret_cast<float*>(shares + panels * p_units);  // of row block i and panel p at i * panels + p
  float* largest = results + row_blocks * panels * tile;
  float* sums = largest + panels * kPanel;
  float* factors = sums + panels * kPanel;
  const auto count = [&](int p) { return static_cast<int>(std::min<int64_t>(kPanel, end - first - p * kPanel)); };
  const auto token = [&](int64_t column) { return column / G; };
  const auto head = [&](int64_t column) { return j * G + column % G; };
  const auto at = [&](int p, int c) { return first + p * kPanel + c; };
  // Keys that a token sees: from `oldest` up to, and with, its own.
  const auto own = [&](int64_t t) { return past() + t; };
  const auto oldest = [&](int64_t t) { return window > 0 ? std::max<int64_t>(0, own(t) - window + 1) : 0; };

  std::fill_n(results, row_blocks * panels * tile, 0.0f);
  for (int p = 0; p < panels; ++p) {
    const char* rows[kPanel];
    for (int c = 0; c < kPanel; ++c) {
      const int64_t column = at(p, c < count(p) ? c : 0);
      rows[c] = q.row(b, head(column), token(column));
      largest[p * kPanel + c] = sinks == nullptr ? kNothing : sinks[head(column)];
      sums[p * kPanel + c] = sinks == nullptr ? 0.0f : 1.0f;
    }
    gemm.pack_tokens(queries + p * q_units, rows, count(p), type, d);
  }

  const Workspace& w = Workspace::mine();
  gemm.begin();
  // From a multiple of kRows on, so that the cut of the sums does not depend on a prompt's chunks.
  for (int64_t k0 = oldest(token(first)) / kRows * kRows; k0 <= own(token(end - 1)); k0 += kRows) {
    const auto some = static_cast<int>(std::min<int64_t>(kRows, k.tokens - k0));
    int from = 0, to = panels;  // those with a column that sees any of these keys
    while (own(token(at(from, count(from) - 1))) < k0) ++from;
    while (to > from && oldest(token(at(to - 1, 0))) >= k0 + some) --to;
    if (from == to) continue;
    const int last = count(to - 1);
    const Matrix keys = float_rows(k, b, j, k0, some, type, unpacked.as<char>());
    multiply_matrix(gemm, w, {keys, some, 1, {0}}, {queries + from * q_units, q_units, to - from, last}, d, false);
    for (int p = from; p < to; ++p) {
      int firsts[kPanel], ends[kPanel];
      bool all = true;
      for (int c = 0; c < kPanel; ++c) {
        const int64_t t = token(at(p, c < count(p) ? c : 0));
        firsts[c] = static_cast<int>(std::clamp<int64_t>(oldest(t) - k0, 0, some));
        ends[c] = static_cast<int>(std::clamp<int64_t>(own(t) + 1 - k0, 0, some));
        all = all && firsts[c] == 0 && ends[c] == some;
      }
      float* factor = factors + p * kPanel;
      if (gemm.online_softmax({w.tile(p - from), some, scale, firsts, ends, all, largest + p * kPanel,
                               sums + p * kPanel, factor, shares + p * p_units})) {
        for (int64_t i = 0; i < row_blocks; ++i) {
          const auto rows = static_cast<int>(std::min<int64_t>(kRows, dv - i * kRows));
          gemm.scale_columns(results + (i * panels + p) * tile, rows, factor);
        }
      }
    }
    const Matrix values = float_rows(v, b, j, k0, some, type, unpacked.as<char>());
    for (int64_t i = 0; i < row_blocks; ++i) {
      const auto rows = static_cast<int>(std::min<int64_t>(kRows, dv - i * kRows));
      gemm.pack_columns(w.left, values, i * kRows, rows, 0, some);
      gemm.multiply({results + (i * panels + from) * tile, reinterpret_cast<const char*>(w.left), kLeftStride * 4,
                     rows, shares + from * p_units, p_units, (to - from - 1) * kPanel + last,
                     (some + gemm.values - 1) / gemm.values, true});
    }
  }
  gemm.end();
  for (int p = 0; p < panels; ++p) {
    char* out[kPanel];
    for (int c = 0; c < count(p); ++c) {
      out[c] = y + ((b * q.tokens + token(at(p, c))) * q.heads + head(at(p, c))) * dv * bytes_of(type);
    }
    for (int c = 0; c < kPanel; ++c) factors[c] = 1.0f / sums[p * kPanel + c];
    for (int64_t i = 0; i < row_blocks; ++i) {
      const auto rows = static_cast<int>(std::min<int64_t>(kRows, dv - i * kRows));
      float* result = results + (i * panels + p) * tile;
      gemm.scale_columns(result, rows, factors);
      gemm.store_transposed(out, i * kRows, type, result, rows, count(p));
    }
  }
}

// q (B, H, S, d), k (B, J, P, d), v (B, J, P, v) -> (B, S, H · v). The queries are the last S of P tokens; each sees
// the tokens up to its own, with a window the last `window` of them. k and v may be rows of a cache in 8 bits, of heads
// of width d both. sinks (H), float32: scores that take part in the softmax and have no value.
Tensor prefill_attention(Tensor q, Tensor k, Tensor v, MaybeTensor sinks, double scale, int64_t window) {
  const Type type = float_type(q, "q");
  const Heads queries(q, type, "q"), keys(k, type, "k", queries.width), values(v, type, "v", queries.width);
  const int64_t B = queries.batch, H = queries.heads, S = queries.tokens, J = keys.heads;
  STD_TORCH_CHECK(J >= 1 && H % J == 0 && keys.batch == B && keys.width == queries.width && keys.tokens >= S,
                  "k is not (", B, ", key-value heads, tokens, ", queries.width, ") of at least ", S, " tokens");
  STD_TORCH_CHECK(keys.type == values.type, "k and v are not of one dtype");
  STD_TORCH_CHECK(values.batch == B && values.heads == J && values.tokens == keys.tokens,
                  "v is not of as many heads and tokens as k");
  STD_TORCH_CHECK(!sinks || (sinks->dim() == 1 && sinks->size(0) == H && sinks->is_contiguous() &&
                             sinks->scalar_type() == ScalarType::Float),
                  "sinks are not ", H, " float32 numbers");
  STD_TORCH_CHECK(window >= 0, "window = ", window, ": it is at least 1, or 0 for none");
  Tensor y = fresh({B, S, H * values.width}, q.scalar_type());
  const float* of_heads = sinks ? sinks->const_data_ptr<float>() : nullptr;
  const Job job = {queries, keys, values, type, of_heads, static_cast<float>(scale), window,
                   static_cast<char*>(y.mutable_data_ptr()), gemm_for(type == Type::kBFloat16)};
  const int64_t columns = S * job.group(), some = kPanels * kPanel, blocks = (columns + some - 1) / some;
  const double cost = 0.01 * static_cast<double>(some * keys.tokens * (keys.width + values.width));
  each(B * J * blocks, cost, [&](int64_t i) {
    const int64_t block = blocks - 1 - i / (B * J), head = i % (B * J);  // the long ones first
    job.run(head / J, head % J, block * some, std::min(columns, (block + 1) * some));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) {
  m.def("prefill_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, float scale, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("prefill_attention", TORCH_BOX(&prefill_attention)); }

}  // namespace handful
