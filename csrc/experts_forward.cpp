// The forward pass of the routed experts: GEMM for many tokens, GEMV for few.
#include <algorithm>

#include "experts_call.h"
#include "gemv.h"

namespace handful {
namespace {

// Assignments that are computed before their sum is, for each expert at least `kLoad`.
constexpr int64_t kAtOnce = 16384, kLoad = 256;

// The experts of `many`, by GEMM: writes the rows of their assignments to out_ND. Hidden values go to `kept` if any.
void run_gemm(const ExpertsCall& call, const ExpertSort& sorted, const std::vector<char>& many, float* out_ND,
              void* kept) {
  const Gemm& gemm = *call.gemm;
  const int values = gemm.values;
  const int64_t D = call.width, F = call.hidden, G = call.gate_up.rows;
  const int64_t x_units = right_units(gemm, D), a_units = panel_units(F, values) * kPanel;
  const auto panels = static_cast<int64_t>(sorted.panels.size());
  const auto wanted = [&](int64_t e) { return many[e] != 0; };
  const Buffer x_buffer(panels * x_units * 4), a_buffer(panels * a_units * 4);
  uint32_t* x_panels = x_buffer.as<uint32_t>();
  uint32_t* a_panels = a_buffer.as<uint32_t>();

  each(panels, 0.5 * D * kPanel, [&](int64_t p) {
    if (wanted(sorted.panels[p].expert)) pack_panel(call, sorted, p, call.x, call.x_type, x_panels + p * x_units);
  });

  const bool gate = is_gated(call.kind);
  const std::vector<GemmItem> first = gemm_items(sorted, F, gate ? kRows / 2 : kRows, wanted);
  each(static_cast<int64_t>(first.size()), kItemCost * D, [&](int64_t i) {
    const GemmItem& item = first[i];
    const Workspace& w = Workspace::mine();
    const Matrix m = call.gate_up[item.expert];
    const Right right = panels_of(sorted, item.panel, item.panels, x_panels, x_units);
    const bool bias = call.gate_up.bias != nullptr;
    if (bias) {
      fill_with_bias(w, item.panels, call.gate_up, item.expert, item.row, 0, item.rows);
      if (gate) fill_with_bias(w, item.panels, call.gate_up, item.expert, F + item.row, item.rows, item.rows);
    }
    gemm.begin();
    multiply_matrix(gemm, w, {m, item.rows, gate ? 2 : 1, {item.row, F + item.row}}, right, D, bias);
    gemm.end();
    const int64_t kept_row = kPanel * bytes_of(call.type());
    for (int p = 0; p < item.panels; ++p) {
      const auto keep = [&](int64_t row) {
        return kept == nullptr ? nullptr : static_cast<char*>(kept) + ((item.panel + p) * G + row) * kept_row;
      };
      uint32_t* to = a_panels + (item.panel + p) * a_units;
      const int columns = gemm.quantize == nullptr ? right.columns(p) : kPanel;
      gemm.activate({call.kind, item.rows, columns, w.tile(p), gate ? w.tile(p) + item.rows * kPanel : nullptr,
                     to + item.row / values * kPanel, keep(item.row), gate ? keep(F + item.row) : nullptr,
                     call.type()});
      if (item.row + item.rows == F) {
        const int64_t end = (F + values - 1) / values * kPanel;
        std::fill(to + end, to + a_units, 0u);
      }
    }
  });

  const bool quantize = gemm.quantize != nullptr;
  const int64_t right_a_units = right_units(gemm, F);
  const Buffer right_buffer(quantize ? panels * right_a_units * 4 : 0);
  uint32_t* right_a_panels = quantize ? right_buffer.as<uint32_t>() : a_panels;
  each(quantize ? panels : 0, 0.5 * F * kPanel, [&](int64_t p) {
    if (!wanted(sorted.panels[p].expert)) return;
    const auto* a = reinterpret_cast<const float*>(a_panels + p * a_units);
    gemm.quantize(right_a_panels + p * right_a_units, a, F, gemm.limits.hidden);
  });

  const std::vector<GemmItem> second = gemm_items(sorted, D, kRows, wanted);
  each(static_cast<int64_t>(second.size()), kItemCost * F, [&](int64_t i) {
    const GemmItem& item = second[i];
    const Workspace& w = Workspace::mine();
    const Matrix m = call.down[item.expert];
    const Right right = panels_of(sorted, item.panel, item.panels, right_a_panels, right_a_units);
    const bool bias = call.down.bias != nullptr;
    if (bias) fill_with_bias(w, item.panels, call.down, item.expert, item.row, 0, item.rows);
    gemm.begin();
    multiply_matrix(gemm, w, {m, item.rows, 1, {item.row}}, right, F, bias);
    gemm.end();
    store_assignments(call, sorted, item, w, out_ND);
  });
}

// The experts of `used`, by GEMV: the same.
void run_gemv(const ExpertsCall& call, const ExpertSort& sorted, const std::vector<char>& used, float* out_ND) {
  const int64_t D = call.width, F = call.hidden, G = call.gate_up.rows;
  std::vector<GemvItem> items;
  items.reserve(kItems);
  std::vector<int64_t> theirs;  // their assignments, by place in the sort
  theirs.reserve(sorted.size());
  for (int64_t e = 0; e < call.experts; ++e) {
    for (int64_t n = sorted.offsets[e]; used[e] && n < sorted.offsets[e + 1]; ++n) theirs.push_back(n);
  }
  if (theirs.empty()) return;
  const auto count = static_cast<int64_t>(theirs.size());
  std::vector<int64_t> slot(sorted.size(), -1);
  for (int64_t i = 0; i < count; ++i) slot[theirs[i]] = i;
  const auto for_each_expert = [&](const auto& work) {
    for (int64_t e = 0; e < call.experts; ++e) {
      if (used[e]) work(e, sorted.offsets[e], static_cast<int>(sorted.load(e)));
    }
  };

  // Each token is prepared once, however many experts it chose.
  std::vector<char> chose(sorted.tokens, 0);
  for (const int64_t n : theirs) chose[sorted.token(n)] = 1;
  const Prepared x(sorted.tokens, D, call.gate_up.first, kByteLimits.input);
  each(sorted.tokens, 1.0 * D, [&](int64_t t) {
    if (chose[t]) x.fill(t, call.x_row(t), call.x_type);
  });

  const Buffer h_buffer(count * G * 4);
  float* h_nG = h_buffer.as<float>();
  int64_t matrices = 0;
  for_each_expert([&](int64_t, int64_t, int) { ++matrices; });
  for_each_expert([&](int64_t e, int64_t first, int load) {
    add_gemv_items(items, call.gate_up, matrices, e, first, load);
  });
  run_gemv_items(call.gate_up, items, [&](int64_t n) { return x.row(sorted.token(n)); },
                   [&](int64_t n) { return h_nG + slot[n] * G; }, G);

  const Prepared a(count, F, call.down.first, kByteLimits.hidden);
  const bool gate = is_gated(call.kind);
  each(count, 2.0 * F, [&](int64_t i) {
    float* h = h_nG + i * G;
    gemv().activate(h, h, gate ? h + F : nullptr, call.kind, F);
    a.fill(i, h);
  });

  items.clear();
  for_each_expert([&](int64_t e, int64_t first, int load) {
    add_gemv_items(items, call.down, matrices, e, first, load);
  });
  run_gemv_items(call.down, items, [&](int64_t n) { return a.row(slot[n]); },
                   [&](int64_t n) { return out_ND + n * D; }, D);
}

// Whether GEMV multiplies all of a call's experts, or GEMM all of them. Each by its own load would be a little quicker
// where loads differ, but then a token's bits would depend on what the other tokens chose.
bool is_of_few_tokens(const ExpertsCall& call) {
  const int64_t K = call.assignments.experts.size(1), most_of_experts = gemv_max_tokens(call.gate_up.first);
  return call.tokens * K <= std::min(most_of_experts * call.experts, kGemvMaxCall * K);
}

// Writes the rows of the assignments of the experts of `here` to out_ND.
void run_experts(const ExpertsCall& call, const ExpertSort& sorted, const std::vector<char>& here, float* out_ND) {
  std::vector<char> used(call.experts);
  for (int64_t e = 0; e < call.experts; ++e) used[e] = here[e] && sorted.load(e) > 0;
  if (std::none_of(used.begin(), used.end(), [](char u) { return u; })) return;
  if (is_of_few_tokens(call)) {
    run_gemv(call, sorted, used, out_ND);
  } else {
    run_gemm(call, sorted, used, out_ND, nullptr);
  }
}

// Tokens `first` up to `end`, to y of a type; `kept` null: nothing is kept.
void run(const ExpertsCall& all, int64_t first, int64_t end, char* y, Type type, void* kept) {
  ExpertsCall call = all;
  call.first_token = first;
  const ExpertSort sorted = sort_by_expert(call.assignments, first, end, call.experts);
  const Buffer out_buffer(sorted.size() * call.width * 4);
  float* out_ND = out_buffer.as<float>();

  const std::vector<char> all_of_them(call.experts, 1);
  if (kept == nullptr) {
    run_experts(call, sorted, all_of_them, out_ND);
  } else {
    run_gemm(call, sorted, all_of_them, out_ND, kept);  // the backward pass reads tiles
  }
  char* to = y + first * call.width * bytes_of(type);
  sum_rows(call.width, sorted, out_ND, call.weights + first * sorted.top_k, to, type);
}

void check_rows(const Tensor& rows, int64_t assignments, int64_t width) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) >= assignments && rows.size(1) == width && rows.is_contiguous() &&
                      rows.scalar_type() == ScalarType::Float,
                  "rows is not a contiguous matrix (", assignments, ", ", width, ") of type float32");
}

ScalarType type_of(bool bf16) { return bf16 ? ScalarType::BFloat16 : ScalarType::Float; }

// Of tokens, each with `top_k` of `count` experts, how many are computed at a time: parts as even as can be, so that none
// is of few tokens where all together are many.
int64_t experts_step(int64_t tokens, int64_t count, int64_t top_k) {
  const int64_t most = std::max<int64_t>(std::max(kAtOnce, kLoad * count) / std::max<int64_t>(top_k, 1), 1);
  const int64_t parts = std::max<int64_t>((tokens + most - 1) / most, 1);
  return std::max<int64_t>((tokens + parts - 1) / parts, 1);
}

}  // namespace

Tensor experts(const Tensor& x, const Assignments& assignments, const ExpertsWeights& weights, bool bf16) {
  const ExpertsCall call = make_call(x, assignments, weights, bf16);
  const int64_t tokens = x.size(0), step = experts_step(tokens, call.experts, assignments.experts.size(1));
  Tensor y = fresh({tokens, call.width}, type_of(bf16));
  char* out = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t t = 0; t < tokens; t += step) run(call, t, std::min(t + step, tokens), out, call.type(), nullptr);
  return y;
}

namespace {

Tensor experts_op(Tensor x, Tensor chosen, Tensor weights, MaybeTensor dropped, Tensor gate_up, Tensor down,
                  MaybeTensor gate_up_bias, MaybeTensor down_bias, std::string activation, bool bf16) {
  return experts(x, {chosen, weights, dropped},
                 float_weights(gate_up, down, gate_up_bias, down_bias, activation), bf16);
}

// `experts`, and the hidden values before their activation, (panels, G, 32), which the backward pass needs. `whole`: y is
// the float32 that it is summed in, whatever products are of.
std::tuple<Tensor, Tensor> experts_forward(Tensor x, Tensor chosen, Tensor weights, MaybeTensor dropped, Tensor gate_up,
                                           Tensor down, MaybeTensor gate_up_bias, MaybeTensor down_bias,
                                           std::string activation, bool bf16, bool whole) {
  const Assignments assignments = {chosen, weights, dropped};
  const ExpertsWeights given = float_weights(gate_up, down, gate_up_bias, down_bias, activation);
  const ExpertsCall call = make_call(x, assignments, given, bf16);
  const int64_t tokens = x.size(0), panels = most_panels(chosen.size(0) * chosen.size(1), call.experts);
  Tensor y = fresh({tokens, call.width}, type_of(bf16 && !whole));
  Tensor kept = lasting({panels, call.gate_up.rows, kPanel}, type_of(bf16),
                        panels * call.gate_up.rows * kPanel * bytes_of(call.type()));
  const Type type = whole ? Type::kFloat32 : call.type();
  run(call, 0, tokens, static_cast<char*>(y.mutable_data_ptr()), type, kept.mutable_data_ptr());
  return {y, kept};
}

// `experts` with codes and their scales.
Tensor experts_quantized(Tensor x, Tensor chosen, Tensor weights, MaybeTensor dropped, Tensor gate_up,
                         Tensor gate_up_scales, Tensor down, Tensor down_scales, MaybeTensor gate_up_bias,
                         MaybeTensor down_bias, std::string activation, int64_t hidden, int64_t bits, int64_t group,
                         bool bf16) {
  return experts(x, {chosen, weights, dropped},
                 {gate_up, gate_up_scales, down, down_scales, gate_up_bias, down_bias, activation, hidden, bits, group},
                 bf16);
}

// `experts` in parts, for weights that are not all in memory: this for one set of experts after another, each expert
// once, and then `experts_sum`. For x of at most `experts_step` tokens the bits are those of `experts`.
//
// places (E) int64: the matrix of each expert; below 0: its matrix is not given, and its rows are left as they are.
// rows (N, D) float32: a row for each computed assignment, by expert, earlier tokens first. Returns how many it wrote.
// tokens: of the whole call that x has a part of, where others compute the rest; 0: x is all of it.
int64_t experts_rows(Tensor rows, Tensor x, Tensor chosen, MaybeTensor dropped, Tensor places, Tensor gate_up,
                     MaybeTensor gate_up_scales, Tensor down, MaybeTensor down_scales, MaybeTensor gate_up_bias,
                     MaybeTensor down_bias, std::string activation, int64_t hidden, int64_t bits, int64_t group,
                     bool bf16, int64_t tokens) {
  const Assignments assignments = {chosen, {}, dropped};
  const ExpertsWeights given = {gate_up,   gate_up_scales, down,   down_scales, gate_up_bias,
                                down_bias, activation,     hidden, bits,        group};
  ExpertsCall call = make_call(x, assignments, given, bf16);
  STD_TORCH_CHECK(places.dim() == 1 && places.is_contiguous() && places.scalar_type() == ScalarType::Long,
                  "places is not a contiguous vector of type int64");
  const int64_t* place = places.const_data_ptr<int64_t>();
  const int64_t slots = call.experts;
  call.experts = places.size(0);
  if (tokens != 0) call.tokens = tokens;
  call.gate_up.places = call.down.places = place;
  std::vector<char> here(call.experts);
  for (int64_t e = 0; e < call.experts; ++e) {
    STD_TORCH_CHECK(place[e] < slots, "places names matrix ", place[e], ": there are ", slots, ", counted from 0");
    here[e] = place[e] >= 0;
  }
  const ExpertSort sorted = sort_by_expert(assignments, 0, x.size(0), call.experts);
  check_rows(rows, sorted.size(), call.width);
  run_experts(call, sorted, here, static_cast<float*>(rows.mutable_data_ptr()));
  int64_t done = 0;
  for (int64_t e = 0; e < call.experts; ++e) done += here[e] ? sorted.load(e) : 0;
  return done;
}

// y (T, D): the rows of `experts_rows` weighted and summed; `count` is E.
Tensor experts_sum(Tensor rows, Tensor chosen, Tensor weights, MaybeTensor dropped, int64_t count, bool bf16) {
  const Assignments assignments = {chosen, weights, dropped};
  STD_TORCH_CHECK(rows.dim() == 2 && count >= 1, "rows is not a matrix (assignments, width)");
  check_assignments(assignments, chosen.dim() == 2 ? chosen.size(0) : 0);
  const ExpertSort sorted = sort_by_expert(assignments, 0, chosen.size(0), count);
  check_rows(rows, sorted.size(), rows.size(1));
  Tensor y = fresh({chosen.size(0), rows.size(1)}, type_of(bf16));
  sum_rows(rows.size(1), sorted, rows.const_data_ptr<float>(), weights.const_data_ptr<float>(),
           static_cast<char*>(y.mutable_data_ptr()), bf16 ? Type::kBFloat16 : Type::kFloat32);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) {
  m.def(
      "experts(Tensor x, Tensor experts, Tensor weights, Tensor? dropped, Tensor gate_up, Tensor down, "
      "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool bf16) -> Tensor");
  m.def(
      "experts_forward(Tensor x, Tensor experts, Tensor weights, Tensor? dropped, Tensor gate_up, Tensor down, "
      "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool bf16, bool whole=False) -> (Tensor, Tensor)");
  m.def(
      "experts_quantized(Tensor x, Tensor experts, Tensor weights, Tensor? dropped, Tensor gate_up, "
      "Tensor gate_up_scales, Tensor down, Tensor down_scales, Tensor? gate_up_bias, Tensor? down_bias, "
      "str activation, int hidden, int bits, int group, bool bf16) -> Tensor");
  m.def(
      "experts_rows(Tensor(a!) rows, Tensor x, Tensor experts, Tensor? dropped, Tensor places, Tensor gate_up, "
      "Tensor? gate_up_scales, Tensor down, Tensor? down_scales, Tensor? gate_up_bias, Tensor? down_bias, "
      "str activation, int hidden, int bits, int group, bool bf16, int tokens=0) -> int");
  m.def("experts_sum(Tensor rows, Tensor experts, Tensor weights, Tensor? dropped, int count, bool bf16) -> Tensor");
  m.def("experts_step(int tokens, int count, int top_k) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CompositeExplicitAutograd, m) { m.impl("experts_step", TORCH_BOX(&experts_step)); }

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) {
  m.impl("experts", TORCH_BOX(&experts_op));
  m.impl("experts_forward", TORCH_BOX(&experts_forward));
  m.impl("experts_quantized", TORCH_BOX(&experts_quantized));
  m.impl("experts_rows", TORCH_BOX(&experts_rows));
  m.impl("experts_sum", TORCH_BOX(&experts_sum));
}

}  // namespace handful
