// Weights as the operations were given them, checked.
#pragma once

#include "kernels.h"
#include "tensors.h"

namespace handful {

// Float weights, or codes with their scales.
struct WeightTensors {
  const Tensor& codes;
  const MaybeTensor& scales;
  int64_t bits = 0;   // 8 or 4; 0: float32 or bfloat16
  int64_t group = 0;  // columns that share a scale
};

// `count` matrices of `rows` × `width`, at equal distances; the bias is a row of float32 or bfloat16 for each.
struct Stack {
  Matrix first;
  int64_t count, rows, width;
  const void* bias;
  Type bias_type;
  int64_t step = 0;        // from one matrix to the next, in bytes
  int64_t scale_step = 0;  // in scales
  int64_t bias_step = 0;   // in biases
  const int64_t* places = nullptr;  // where matrix i is; null: at i

  Matrix operator[](int64_t i) const;
  // Bytes of one matrix, scales included.
  int64_t bytes() const;
  // Writes biases `row` to `row + some` of matrix i to `out`; zeros if there are none.
  void copy_bias(float* out, int64_t i, int64_t row, int64_t some) const;
};

// The weight of a norm of rows of some width.
struct NormWeight {
  const char* data = nullptr;  // null: there is none
  Type type = Type::kFloat32;
};

NormWeight norm_weight(const MaybeTensor& weight, int64_t width, const char* name);

// `part`: what of `name` it is.
Type float_type(const Tensor& tensor, const char* name, const char* part = "");
Activation activation_of(const std::string& name);

// Checks types and shapes (count, rows, width), of scales and bias too, and that each matrix is contiguous. `count` 0:
// the tensor is one matrix and has no first dimension.
Stack make_stack(const WeightTensors& given, const MaybeTensor& bias, const char* name, int64_t count, int64_t rows,
                 int64_t width);

// Lets vectors of bfloat16 be rounded where they meet a matrix: to bfloat16, or to 8 bits.
void round_vectors(Matrix& m, bool bf16);

// Columns that a row of `width` codes is stored in.
int64_t stored_columns(int64_t width, int64_t group);

}  // namespace handful
