// The backward pass of out_n = W_down · act(W_gate_up · x_t), y_t = sum over the token's n of weight_n · out_n.
//
//   grad a_n        = W_downᵀ · grad y_t
//   grad weight_n   = grad a_n · a_n (+ grad y_t · down's bias), so that out_n need not be kept
//   grad h_n        = weight_n · grad a_n ∘ act'(h_n)
//   grad W_down     = sum over n of grad y_t ⊗ (weight_n · a_n)
//   grad W_gate_up  = sum over n of grad h_n ⊗ x_t
//   grad x_t        = sum over the token's n of W_gate_upᵀ · grad h_n
#include <algorithm>
#include <cstring>

#include "experts_call.h"

namespace handful {
namespace {

// Rows of 32 assignments each, of the units' own type: panel p's row r at p · rows + r.
struct Rows {
  Buffer memory;
  int64_t rows, row_bytes;

  Rows(int64_t panels, int64_t rows, int values)
      : memory(panels * rows * kPanel * 4 / values), rows(rows), row_bytes(kPanel * 4 / values) {}

  char* at(int64_t panel, int64_t row) const { return memory.as<char>() + (panel * rows + row) * row_bytes; }

  // Packs a left matrix whose sum runs over one expert's assignments, from k0 (the first of some panel) on. A panel's
  // columns without a token may hold anything, even NaN, and are left out.
  void pack(uint32_t* left, int64_t first_panel, int64_t row, int count, int64_t k0, int some) const {
    for (int r = 0; r < count; ++r) {
      char* to = reinterpret_cast<char*>(left + r * kLeftStride);
      for (int64_t k = 0; k < some; k += kPanel, to += row_bytes) {
        const char* from = at(first_panel + (k0 + k) / kPanel, row + r);
        if (some - k < kPanel) {
          const int64_t bytes = (some - k) * (row_bytes / kPanel);
          std::memcpy(to, from, bytes);
          std::memset(to + bytes, 0, row_bytes - bytes);
        } else if (row_bytes == 4 * kPanel) {  // memcpy of a constant size is no call
          std::memcpy(to, from, 4 * kPanel);
        } else {
          std::memcpy(to, from, 2 * kPanel);
        }
      }
    }
  }
};

// Rows of tokens as the right matrix of a sum over each expert's assignments: panels of 32 of the D columns.
struct ByExpert {
  std::vector<int64_t> offsets;  // of an expert's units
  std::vector<int64_t> strides;  // of its panels
  int64_t width;
  Buffer memory;

  ByExpert(const ExpertSort& sorted, int64_t width, int values) : width(width) {
    const int64_t panels = (width + kPanel - 1) / kPanel;
    int64_t units = 0;
    for (size_t e = 0; e + 1 < sorted.offsets.size(); ++e) {
      offsets.push_back(units);
      strides.push_back(panel_units(sorted.load(static_cast<int64_t>(e)), values) * kPanel);
      units += panels * strides.back();
    }
    memory = Buffer(units * 4);
  }

  uint32_t* panel(int64_t e, int64_t p) const { return memory.as<uint32_t>() + offsets[e] + p * strides[e]; }

  Right right(int64_t e, int64_t first, int panels) const {
    const int64_t rest = width - (first + panels - 1) * kPanel;
    return {panel(e, first), strides[e], panels, static_cast<int>(rest < kPanel ? rest : kPanel)};
  }
};

// Blocks of a weight gradient: rows of one expert, and panels of 32 columns.
std::vector<GemmItem> grad_items(const ExpertSort& sorted, int64_t experts, int64_t rows, int64_t width) {
  std::vector<GemmItem> items;
  const int64_t panels = (width + kPanel - 1) / kPanel;
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t r = 0; sorted.load(e) > 0 && r < rows; r += kRows) {
      for (int64_t p = 0; p < panels; p += Workspace::kGroup) {
        items.push_back({static_cast<int>(e), static_cast<int>(std::min<int64_t>(kRows, rows - r)),
                         static_cast<int>(std::min<int64_t>(Workspace::kGroup, panels - p)), r, p});
      }
    }
  }
  return items;
}

void zero_idle(const ExpertSort& sorted, const Stack& stack, char* grad, Type type) {
  const int64_t bytes = stack.rows * stack.width * bytes_of(type);
  for (int64_t e = 0; e < stack.count; ++e) {
    if (sorted.load(e) == 0) std::memset(grad + e * bytes, 0, bytes);
  }
}

class Backward {
 public:
  Backward(const ExpertsCall& call, const Tensor& grad_y, const Tensor& kept)
      : call_(call),
        gemm_(*call.gemm),
        values_(gemm_.values),
        sorted_(sort_by_expert(call.assignments, 0, call.assignments.experts.size(0), call.experts)),
        panels_(static_cast<int64_t>(sorted_.panels.size())),
        gate_(is_gated(call.kind)),
        half_units_(panel_units(call.hidden, values_)),
        grad_y_(data_of(grad_y)),
        grad_y_type_(float_type(grad_y, "grad_y")),
        kept_(data_of(kept)),
        grad_h_(panels_, call.gate_up.rows, values_),
        activated_(panels_, call.hidden, values_),
        grad_h_units_(values_ == 1 ? 0 : panels_ * (gate_ ? 2 : 1) * half_units_ * kPanel * 4) {}

  // grad h, weighted a, and the routing weights' gradient (T, K).
  void through_down(float* grad_weights) {
    const int64_t D = call_.width, F = call_.hidden, units = panel_units(D, values_) * kPanel;
    const Buffer y_buffer(panels_ * units * 4);
    uint32_t* y_panels = y_buffer.as<uint32_t>();
    each(panels_, 0.5 * D * kPanel, [&](int64_t p) {
      pack_panel(call_, sorted_, p, grad_y_, grad_y_type_, y_panels + p * units);
    });
    // A weight's gradient is a sum over blocks of F, which are kept apart and summed in order.
    const int64_t blocks = (F + kRows - 1) / kRows;
    const Buffer parts_buffer(blocks * panels_ * kPanel * 4);
    float* parts = parts_buffer.as<float>();
    const std::vector<GemmItem> items = gemm_items(sorted_, F, kRows, [](int64_t) { return true; });
    each(static_cast<int64_t>(items.size()), kItemCost * D, [&](int64_t i) {
      const GemmItem& item = items[i];
      const Workspace& w = Workspace::mine();
      const Matrix m = call_.down[item.expert];
      const Right right = panels_of(sorted_, item.panel, item.panels, y_panels, units);
      gemm_.begin();
      multiply_block(gemm_, w, item.rows, right, D, false, [&](uint32_t* left, int64_t k0, int some) {
        gemm_.pack_columns(left, m, item.row, item.rows, k0, some);
      });
      gemm_.end();
      for (int p = 0; p < item.panels; ++p) {
        activate(item, p, w.tile(p), parts + (item.row / kRows * panels_ + item.panel + p) * kPanel);
      }
    });
    std::fill_n(grad_weights, sorted_.place.size(), 0.0f);
    each(panels_, 1.0 * (blocks * kPanel + (call_.down.bias == nullptr ? 0 : D * kPanel)), [&](int64_t p) {
      const Panel& panel = sorted_.panels[p];
      float sums[kPanel] = {};
      if (call_.down.bias != nullptr) add_bias_dots(panel, sums);
      for (int c = 0; c < panel.count; ++c) {
        for (int64_t b = 0; b < blocks; ++b) sums[c] += parts[(b * panels_ + p) * kPanel + c];
        grad_weights[sorted_.order[panel.first + c]] = sums[c];
      }
    });
  }

  void to_x(char* grad_x) {
    const int64_t D = call_.width, F = call_.hidden;
    const Buffer rows_buffer(sorted_.size() * D * 4);
    float* rows_ND = rows_buffer.as<float>();
    const uint32_t* all = values_ == 1 ? grad_h_.memory.as<uint32_t>() : grad_h_units_.as<uint32_t>();
    const int64_t half = (values_ == 1 ? F : half_units_) * kPanel;
    const std::vector<GemmItem> items = gemm_items(sorted_, D, kRows, [](int64_t) { return true; });
    each(static_cast<int64_t>(items.size()), kItemCost * (gate_ ? 2 : 1) * F, [&](int64_t i) {
      const GemmItem& item = items[i];
      const Workspace& w = Workspace::mine();
      const Matrix m = call_.gate_up[item.expert];
      gemm_.begin();
      for (int part = 0; part < (gate_ ? 2 : 1); ++part) {
        const Right right = panels_of(sorted_, item.panel, item.panels, all, (gate_ ? 2 : 1) * half);
        const Right of_part = {right.first + part * half, right.stride, right.panels, right.last_columns};
        multiply_block(gemm_, w, item.rows, of_part, F, part > 0, [&](uint32_t* left, int64_t k0, int some) {
          gemm_.pack_columns(left, m, item.row, item.rows, part * F + k0, some);
        });
      }
      gemm_.end();
      store_assignments(call_, sorted_, item, w, rows_ND);
    });
    sum_rows(call_.width, sorted_, rows_ND, nullptr, grad_x, call_.x_type);
  }

  void to_gate_up(char* grad) {
    const Stack& stack = call_.gate_up;
    const ByExpert x = by_expert(call_.x, call_.x_type);
    weight_gradient(grad_h_, stack.rows, x, [&](const GemmItem& item, int p, const float* tile, int columns) {
      char* out[kRows];
      for (int r = 0; r < item.rows; ++r) {
        const int64_t row = item.expert * stack.rows + item.row + r;
        out[r] = grad + row * stack.width * bytes_of(stack.first.type);
      }
      gemm_.store_rows(out, (item.panel + p) * kPanel, stack.first.type, tile, item.rows, columns);
    });
    zero_idle(sorted_, stack, grad, stack.first.type);
  }

  // Computed as (F, D), for which the left matrix is there, and stored transposed.
  void to_down(char* grad) {
    const Stack& stack = call_.down;
    const ByExpert y = by_expert(grad_y_, grad_y_type_);
    weight_gradient(activated_, stack.width, y, [&](const GemmItem& item, int p, const float* tile, int columns) {
      char* out[kPanel];
      for (int c = 0; c < columns; ++c) {
        const int64_t row = item.expert * stack.rows + (item.panel + p) * kPanel + c;
        out[c] = grad + row * stack.width * bytes_of(stack.first.type);
      }
      gemm_.store_transposed(out, item.row, stack.first.type, tile, item.rows, columns);
    });
    zero_idle(sorted_, stack, grad, stack.first.type);
  }

  // In float32: (E, G) and (E, D).
  void to_biases(float* gate_up, float* down) {
    const int64_t G = call_.gate_up.rows, D = call_.width;
    each(call_.experts, 1e5, [&](int64_t e) {
      std::fill_n(gate_up + e * G, G, 0.0f);
      std::fill_n(down + e * D, D, 0.0f);
      std::vector<float> row(std::max<int64_t>(D, kPanel));
      for (int64_t p = sorted_.first_panel[e]; p < sorted_.first_panel[e + 1]; ++p) {
        const Panel& panel = sorted_.panels[p];
        for (int64_t g = 0; g < G; ++g) {
          gemv().to_float(row.data(), grad_h_.at(p, g), values_ == 1 ? Type::kFloat32 : Type::kBFloat16, kPanel);
          for (int c = 0; c < panel.count; ++c) gate_up[e * G + g] += row[c];
        }
        for (int c = 0; c < panel.count; ++c) {
          const int64_t n = panel.first + c;
          gemv().to_float(row.data(), y_row(sorted_.token(n)), grad_y_type_, D);
          const float weight = call_.weights[sorted_.order[n]];
          for (int64_t d = 0; d < D; ++d) down[e * D + d] += weight * row[d];
        }
      }
    });
  }

 private:
  const char* y_row(int64_t token) const { return grad_y_ + token * call_.width * bytes_of(grad_y_type_); }

  // sums[c] += grad y of the panel's token c · down's bias.
  void add_bias_dots(const Panel& panel, float* sums) const {
    std::vector<float> bias(call_.width), y(call_.width);
    call_.down.copy_bias(bias.data(), panel.expert, 0, call_.width);
    for (int c = 0; c < panel.count; ++c) {
      gemv().to_float(y.data(), y_row(sorted_.token(panel.first + c)), grad_y_type_, call_.width);
      for (int64_t d = 0; d < call_.width; ++d) sums[c] += bias[d] * y[d];
    }
  }

  void activate(const GemmItem& item, int p, const float* grad, float* weight_grads) {
    const int64_t F = call_.hidden, G = call_.gate_up.rows, at = item.panel + p;
    const Panel& panel = sorted_.panels[at];
    float weights[kPanel] = {};
    for (int c = 0; c < panel.count; ++c) weights[c] = call_.weights[sorted_.order[panel.first + c]];
    const Type keep = call_.type();
    const auto kept = [&](int64_t row) { return kept_ + (at * G + row) * kPanel * bytes_of(keep); };
    uint32_t* units = nullptr;
    if (values_ == 2) {
      units = grad_h_units_.as<uint32_t>() + at * (gate_ ? 2 : 1) * half_units_ * kPanel;
      if (item.row + item.rows == F) {  // zeros up to the grid
        for (int part = 0; part < (gate_ ? 2 : 1); ++part) {
          uint32_t* half = units + part * half_units_ * kPanel;
          std::fill(half + (F + 1) / 2 * kPanel, half + half_units_ * kPanel, 0u);
        }
      }
      units += item.row / 2 * kPanel;
    }
    gemm_.activate_backward({call_.kind, item.rows, grad, kept(item.row), gate_ ? kept(F + item.row) : nullptr, keep,
                             weights, weight_grads, grad_h_.at(at, item.row),
                             gate_ ? grad_h_.at(at, F + item.row) : nullptr, activated_.at(at, item.row), units,
                             units == nullptr ? nullptr : units + half_units_ * kPanel});
  }

  ByExpert by_expert(const char* x, Type type) const {
    const int64_t D = call_.width, panels = (D + kPanel - 1) / kPanel;
    ByExpert all(sorted_, D, values_);
    each(call_.experts * panels, 0.1 * sorted_.size() / call_.experts * kPanel, [&](int64_t i) {
      const int64_t e = i / panels, p = i % panels, load = sorted_.load(e);
      std::vector<const char*> rows(load);
      for (int64_t n = 0; n < load; ++n) rows[n] = x + sorted_.token(sorted_.offsets[e] + n) * D * bytes_of(type);
      const auto columns = static_cast<int>(std::min<int64_t>(kPanel, D - p * kPanel));
      gemm_.pack_transposed(all.panel(e, p), rows.data(), load, type, p * kPanel, columns);
    });
    return all;
  }

  template <class Store>
  void weight_gradient(const Rows& left_rows, int64_t rows, const ByExpert& right, const Store& store) const {
    const std::vector<GemmItem> items = grad_items(sorted_, call_.experts, rows, call_.width);
    const double load = static_cast<double>(sorted_.size()) / static_cast<double>(call_.experts);
    each(static_cast<int64_t>(items.size()), kItemCost * load, [&](int64_t i) {
      const GemmItem& item = items[i];
      const Workspace& w = Workspace::mine();
      const Right columns = right.right(item.expert, item.panel, item.panels);
      gemm_.begin();
      multiply_block(gemm_, w, item.rows, columns, sorted_.load(item.expert), false,
                     [&](uint32_t* left, int64_t k0, int some) {
                       left_rows.pack(left, sorted_.first_panel[item.expert], item.row, item.rows, k0, some);
                     });
      gemm_.end();
      for (int p = 0; p < item.panels; ++p) store(item, p, w.tile(p), columns.columns(p));
    });
  }

  const ExpertsCall& call_;
  const Gemm& gemm_;
  const int values_;
  const ExpertSort sorted_;
  const int64_t panels_;
  const bool gate_;
  const int64_t half_units_;
  const char* grad_y_;
  const Type grad_y_type_;
  const char* kept_;
  const Rows grad_h_, activated_;
  const Buffer grad_h_units_;  // panels of gate's half and of up's; empty where rows are panels
};

// Gradients of x, weights, gate_up, down, gate_up_bias and down_bias; those of weights and biases only
// `for_parameters`, and of x only `for_x` (otherwise they are empty tensors).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    Tensor grad_y, Tensor x, Tensor chosen, Tensor weights, MaybeTensor dropped, Tensor gate_up, Tensor down,
    MaybeTensor gate_up_bias, MaybeTensor down_bias, Tensor kept, std::string activation, bool bf16, bool for_x,
    bool for_parameters) {
  const Assignments assignments = {chosen, weights, dropped};
  const ExpertsWeights given = float_weights(gate_up, down, gate_up_bias, down_bias, activation);
  const ExpertsCall call = make_call(x, assignments, given, bf16);
  STD_TORCH_CHECK(grad_y.dim() == 2 && grad_y.size(0) == x.size(0) && grad_y.size(1) == x.size(1) &&
                      grad_y.is_contiguous(),
                  "grad_y is not a contiguous matrix of x's shape");
  STD_TORCH_CHECK(kept.dim() == 3 && kept.size(0) == most_panels(chosen.size(0) * chosen.size(1), call.experts) &&
                      kept.size(1) == call.gate_up.rows && kept.size(2) == kPanel && kept.is_contiguous() &&
                      float_type(kept, "kept") == call.type(),
                  "kept is not what the forward pass returned");

  const auto like = [&](const Tensor& t, bool wanted) {
    Shape shape;
    for (int64_t d = 0; d < t.dim(); ++d) shape.add(wanted ? t.size(d) : 0);
    Tensor grad = fresh(shape, t.scalar_type());
    use_huge_pages(grad.mutable_data_ptr(), grad.numel() * bytes_of(float_type(t, "weights")));
    return grad;
  };
  const bool biases = for_parameters && gate_up_bias.has_value() && down_bias.has_value();
  const auto bias_like = [&](const Stack& stack) {
    return fresh({biases ? stack.count : 0, biases ? stack.rows : 0}, ScalarType::Float);
  };
  Tensor grad_x = like(x, for_x), grad_weights = like(weights, true), grad_gate_up = like(gate_up, for_parameters),
         grad_down = like(down, for_parameters), grad_gate_up_bias = bias_like(call.gate_up),
         grad_down_bias = bias_like(call.down);

  Backward backward(call, grad_y, kept);
  backward.through_down(grad_weights.mutable_data_ptr<float>());
  if (for_x) backward.to_x(static_cast<char*>(grad_x.mutable_data_ptr()));
  if (for_parameters) {
    backward.to_gate_up(static_cast<char*>(grad_gate_up.mutable_data_ptr()));
    backward.to_down(static_cast<char*>(grad_down.mutable_data_ptr()));
  }
  if (biases) {
    backward.to_biases(grad_gate_up_bias.mutable_data_ptr<float>(), grad_down_bias.mutable_data_ptr<float>());
  }
  return {grad_x, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) {
  m.def(
      "experts_backward(Tensor grad_y, Tensor x, Tensor experts, Tensor weights, Tensor? dropped, Tensor gate_up, "
      "Tensor down, Tensor? gate_up_bias, Tensor? down_bias, Tensor kept, str activation, bool bf16, bool for_x, "
      "bool for_parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("experts_backward", TORCH_BOX(&experts_backward)); }

}  // namespace handful
