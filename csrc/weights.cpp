#include "weights.h"

#include <algorithm>
#include <cstring>

namespace handful {
namespace {

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

// `part`: what of `name` it is.
void check_shape(const Tensor& tensor, const char* name, const char* part, int64_t count, int64_t rows, int64_t width) {
  const int64_t lead = count > 0 ? 1 : 0;
  const bool right = tensor.dim() == lead + (width > 0 ? 2 : 1) && (lead == 0 || tensor.size(0) == count) &&
                     tensor.size(lead) == rows && (width == 0 || tensor.size(lead + 1) == width);
  STD_TORCH_CHECK(right, name, part, " has shape ", shape_of(tensor), ": it must be (",
                  count > 0 ? std::to_string(count) : "", count > 0 ? ", " : "", rows,
                  width > 0 ? ", " + std::to_string(width) : "", ")");
  int64_t dense = 1;
  bool contiguous = true;
  for (int64_t d = tensor.dim() - 1; d >= lead; --d) {
    contiguous = contiguous && (tensor.stride(d) == dense || tensor.size(d) <= 1);
    dense *= tensor.size(d);
  }
  STD_TORCH_CHECK(contiguous, name, part, " is not contiguous");
}

// From one matrix of a stack to the next, in values.
int64_t step_of(const Tensor& tensor, int64_t count) { return count > 1 ? tensor.stride(0) : 0; }

float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

}  // namespace

Matrix Stack::operator[](int64_t i) const {
  Matrix m = first;
  if (places != nullptr) i = places[i];
  m.data += i * step;
  if (m.scales != nullptr) m.scales += i * scale_step;
  return m;
}

int64_t Stack::bytes() const { return rows * (first.stride + 2 * first.scale_stride); }

void Stack::copy_bias(float* out, int64_t i, int64_t row, int64_t some) const {
  const int64_t at = (places == nullptr ? i : places[i]) * bias_step + row;
  if (bias == nullptr) {
    std::fill(out, out + some, 0.0f);
  } else if (bias_type == Type::kFloat32) {
    std::copy_n(static_cast<const float*>(bias) + at, some, out);
  } else {
    std::transform(static_cast<const uint16_t*>(bias) + at, static_cast<const uint16_t*>(bias) + at + some, out, widened);
  }
}

NormWeight norm_weight(const MaybeTensor& weight, int64_t width, const char* name) {
  if (!weight.has_value()) return {};
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == width && weight->is_contiguous(), name, " does not fit");
  return {data_of(*weight), float_type(*weight, name)};
}

Type float_type(const Tensor& tensor, const char* name, const char* part) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, part,
                  " is neither float32 nor bfloat16");
  return type == ScalarType::Float ? Type::kFloat32 : Type::kBFloat16;
}

Activation activation_of(const std::string& name) {
  if (name == "swiglu") return Activation::kSwiglu;
  if (name == "geglu") return Activation::kGeglu;
  if (name == "swiglu_clamped") return Activation::kSwigluClamped;
  if (name == "gelu") return Activation::kGelu;
  STD_TORCH_CHECK(name == "relu", "activation = '", name, "': one of swiglu, geglu, swiglu_clamped, gelu, relu");
  return Activation::kRelu;
}

void round_vectors(Matrix& m, bool bf16) {
  m.pairs = bf16 && m.type == Type::kBFloat16;
  m.bytes = bf16 && m.group > 0 && !exact_activations();
}

int64_t stored_columns(int64_t width, int64_t group) {
  const int64_t grid = std::max<int64_t>(group, kGrid);
  return (width + grid - 1) / grid * grid;
}

Stack make_stack(const WeightTensors& given, const MaybeTensor& bias, const char* name, int64_t count, int64_t rows,
                 int64_t width) {
  Stack stack{{}, std::max<int64_t>(count, 1), rows, width, nullptr, Type::kFloat32};
  Matrix& m = stack.first;
  m.data = data_of(given.codes);
  if (given.bits == 0) {
    check_shape(given.codes, name, "", count, rows, width);
    m.type = float_type(given.codes, name);
    m.stride = width * bytes_of(m.type);
    stack.step = step_of(given.codes, count) * bytes_of(m.type);
  } else {
    STD_TORCH_CHECK(given.bits == 8 || given.bits == 4, "bits = ", given.bits, ": 8 or 4");
    STD_TORCH_CHECK(given.group == 32 || given.group == 128, "group = ", given.group, ": 32 or 128");
    const bool eight = given.bits == 8;
    STD_TORCH_CHECK(given.codes.scalar_type() == (eight ? ScalarType::Char : ScalarType::Byte), name,
                    eight ? "'s codes are not of type int8" : "'s codes are not of type uint8");
    STD_TORCH_CHECK(given.scales.has_value() && given.scales->scalar_type() == ScalarType::BFloat16, name,
                    "'s scales are not of type bfloat16");
    const int64_t columns = stored_columns(width, given.group);
    m.type = eight ? Type::kInt8 : Type::kInt4;
    m.stride = eight ? columns : columns / 2;
    m.scale_stride = columns / given.group;
    m.group = static_cast<int>(given.group);
    check_shape(given.codes, name, "", count, rows, m.stride);
    check_shape(*given.scales, name, "'s scales", count, rows, m.scale_stride);
    m.scales = static_cast<const uint16_t*>(given.scales->const_data_ptr());
    stack.step = step_of(given.codes, count);  // codes are bytes
    stack.scale_step = step_of(*given.scales, count);
  }
  if (bias.has_value()) {
    check_shape(*bias, name, "_bias", count, rows, 0);
    stack.bias = bias->const_data_ptr();
    stack.bias_type = float_type(*bias, name, "_bias");
    stack.bias_step = step_of(*bias, count);
  }
  return stack;
}

}  // namespace handful
