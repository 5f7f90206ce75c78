// The loops over every weight and every activation, as tables of functions: one for each instruction level.
//
// All GEMM products have one form. The left matrix (weights or gradients) lies in rows, the right one (tokens) in
// panels of 32 columns. A 32-bit unit of either is what one multiply-add takes for a lane: a float32, or a pair of
// bfloat16 that follow each other in the sum.
//
//   left    unit u of row r          at left[r * kLeftStride + u]
//   panel   unit u of column c       at panel[u * kPanel + c]
//   tile    row r of column c        at tile[r * kPanel + c], float32
//
// Tokens are the columns and weights the rows, so a forward pass transposes tokens alone. Codes that are multiplied as
// bytes have panels of another form (byte_panels.inc).
#pragma once

#include <cstdint>

namespace handful {

constexpr int kPanel = 32;              // columns of a panel
constexpr int kDepth = 256;               // units of the sum that are multiplied at once
constexpr int kLeftStride = kDepth + 16;  // units; rows a power of two apart would share a few cache sets
constexpr int kRows = 96;                 // rows of a left block
constexpr int kUnitGrid = 16;             // panels and left rows are zero up to a multiple of so many units

// Panels of bytes (byte_panels.inc): for every kByteDepth values a row of 32 units, which names the groups that
// come twice, and room for each group twice.
constexpr int kByteDepth = 512;           // values that are multiplied at once
constexpr int kByteGroup = 32;            // values that share a scale
constexpr int kByteRecord = 12 * kPanel;  // units of a group
// The error that a vector may have whose numbers become bytes, in parts of its length: inputs, which meet a gate and its
// product, and hidden values. Normal numbers have 0.0056 and, after SwiGLU, 0.0094, and half of that where they are exact
// (byte_panels.inc). Together the limits keep a layer within 1.5e-2, and within 1e-2.
struct Limits {
  float input, hidden;
};
constexpr Limits kByteLimits = {0.0070f, 0.0115f}, kExactLimits = {0.0045f, 0.0055f};

// Codes: a row lies in blocks of 512 columns, of which the last may be shorter, and a block in pieces of 32 columns.
// The word of 4 bytes at 4 * (j * pieces + i) of a block holds columns 4j to 4j + 3 of piece i, for j below 8; at 4
// bits for j below 4, with columns 4j + 16 to 4j + 19 in the bytes' high halves. The words of different pieces are
// neighbours, so that a piece, which has a scale of its own, is a lane.
constexpr int kPiece = 32;
constexpr int kPieces = 16;  // of a whole block
constexpr int kBlock = kPiece * kPieces;
constexpr int kGrid = 64;  // a row is padded to a multiple of it, and of a group

// Tokens up to which GEMV multiplies a matrix: of floats one by one; of codes, or of bfloat16 in pairs.
constexpr int64_t kGemvMaxTokens = 8, kGemvMaxTokensPacked = 16;
// And of a call for experts, whose average load it is, at most so many tokens.
constexpr int64_t kGemvMaxCall = 256;

enum class Type : int { kFloat32, kBFloat16, kInt8, kInt4 };

constexpr int64_t bytes_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// A KV cache's rows in 8 bits (kInt8; handful/kv_rows.py): a bfloat16 scale for each kCacheGroup numbers, then the codes of
// all, and a byte more where they are odd.
constexpr int64_t kCacheGroup = 32;
constexpr int64_t cache8_groups(int64_t width) { return (width + kCacheGroup - 1) / kCacheGroup; }

// Of a row of floats, or of a cache.
constexpr int64_t row_bytes(Type type, int64_t width) {
  return type == Type::kInt8 ? (2 * cache8_groups(width) + width + 1) / 2 * 2 : width * bytes_of(type);
}

enum class Activation : int { kSwiglu, kGeglu, kSwigluClamped, kGelu, kRelu };

constexpr bool is_gated(Activation kind) { return kind != Activation::kGelu && kind != Activation::kRelu; }

// Rows of numbers in memory, `stride` bytes apart. Codes have a bfloat16 scale for each `group` columns.
struct Matrix {
  const char* data;
  Type type;
  int64_t stride;
  const uint16_t* scales;
  int64_t scale_stride;  // scales from one row to the next
  int group;
  bool pairs = false;  // bfloat16 may meet vectors rounded to bfloat16, two products an instruction
  bool bytes = false;  // codes may meet vectors rounded to 8 bits

  const char* row(int64_t r) const { return data + r * stride; }
  // Of rows of codes, with their padding.
  int64_t columns() const { return type == Type::kInt4 ? 2 * stride : stride; }
};

// A block of a row of codes: columns `column` to its end.
struct Block {
  const char* words;
  int pieces;

  Block(const Matrix& m, int64_t row, int64_t column)
      : words(m.row(row) + (m.type == Type::kInt4 ? column / 2 : column)),
        pieces(static_cast<int>(m.columns() - column < kBlock ? (m.columns() - column) / kPiece : kPieces)) {}
};

// The activation of gate and up, which are rows of a tile, and where the results go.
struct Activate {
  Activation kind;
  int rows;           // hidden units
  int columns;        // up to the next multiple of 16 may be set
  const float* gate;  // tile rows
  const float* up;    // null: there is no gate, and `gate` holds the hidden values
  uint32_t* out;      // panel units
  void* keep_gate;    // tile rows of type `keep` for the backward pass; null: not wanted
  void* keep_up;
  Type keep;
};

struct ActivateBackward {
  Activation kind;
  int rows;
  const float* grad;  // tile rows: the gradient of the activated values, before the routing weight
  const void* gate;   // what Activate kept
  const void* up;
  Type keep;
  const float* weights;  // of the 32 columns; zero where there is no token
  float* weight_grads;   // of the 32 columns, set
  // In the kernels' own type, rows of 32 columns: the left matrices of the weights' gradients.
  void* out_gate;
  void* out_up;
  void* activated;  // times the routing weight
  // The same gradients as panel units, for the tokens' gradients.
  uint32_t* panel_gate;
  uint32_t* panel_up;
};

// tiles (+)= left · right for the columns of all panels, of which up to the next multiple of 16 may be set.
struct Product {
  float* tiles;      // panel p's at tiles + p * kRows * kPanel
  const char* left;  // rows of units, wherever they lie, `left_stride` bytes apart
  int64_t left_stride;
  int rows;
  const uint32_t* right;  // panels, `right_stride` units apart
  int64_t right_stride;
  int columns, units;
  bool add;
  const char* next = nullptr;  // the rows of the next product, which may be prefetched
};

// The softmax of a block of scores, keys in rows and queries in columns, after the blocks before it: of each of 32
// columns the largest score and the sum of e^(score - largest) so far.
struct OnlineSoftmax {
  float* scores;  // a tile
  int rows;
  float scale;      // of the scores
  const int* first;  // column c sees rows first[c] <= r < end[c]
  const int* end;
  bool all;          // every column sees all rows
  float* largest;
  float* sums;
  float* factors;  // set: what earlier results are to be multiplied by
  uint32_t* out;   // e^(score - largest) as panel units, zero up to the grid
};

// The kernels of many tokens: products of tiles, and what is done to panels and tiles between them.
struct Gemm {
  const char* name;  // of the level, for people
  uint32_t needs;    // features of the CPU (isa.h)
  int values;        // in a unit
  bool in_place;     // rows of a matrix of the units' own type are multiplied where they lie, and not packed

  // Around all products of a thread: AMX's tiles must be configured and released.
  void (*begin)();
  void (*end)();

  // left[r][k] = m[row + r][k0 + k], `count` values of each of `rows` rows, zeros up to the unit grid.
  void (*pack_rows)(uint32_t* left, const Matrix& m, int64_t row, int rows, int64_t k0, int count);
  // left[r][k] = m[k0 + k][column + r]: the transposed matrix. Not of codes.
  void (*pack_columns)(uint32_t* left, const Matrix& m, int64_t column, int rows, int64_t k0, int count);
  // panel[k][c] = rows[c][k], `count` columns of `width` values, zeros elsewhere.
  void (*pack_tokens)(uint32_t* panel, const char* const* rows, int count, Type type, int64_t width);
  // panel[k][c] = rows[k][column + c], `columns` columns of `count` values, zeros elsewhere.
  void (*pack_transposed)(uint32_t* panel, const char* const* rows, int64_t count, Type type, int64_t column,
                          int columns);

  void (*multiply)(const Product& job);

  void (*activate)(const Activate& job);
  void (*activate_backward)(const ActivateBackward& job);

  // Whether any factor is not 1.
  bool (*online_softmax)(const OnlineSoftmax& job);
  // tile[r][c] *= factors[c]
  void (*scale_columns)(float* tile, int rows, const float* factors);

  // out[c][first + r] = tile[r][c] and out[r][first + c] = tile[r][c]: rows of `type` at `out`.
  void (*store_transposed)(char* const* out, int64_t first, Type type, const float* tile, int rows, int columns);
  void (*store_rows)(char* const* out, int64_t first, Type type, const float* tile, int rows, int columns);

  // Makes the panel that `multiply` takes of one of `width` values from pack_tokens or activate, with an error of about
  // `limit` of a column's length at most. Null: `multiply` takes those as they are.
  void (*quantize)(uint32_t* panel, const float* values, int64_t width, float limit) = nullptr;
  Limits limits = {};
};

constexpr int64_t kKeyBlock = 128;  // keys whose scores are there at once

// Some keys' part in one token's attention: `queries` heads share these keys and their values.
struct Attend {
  const float* query;  // rows of `width`
  int64_t queries, width, value_width;
  const char* keys;  // of `type`, strides in bytes
  const char* values;
  Type type;
  int64_t key_stride, value_stride, count;
  float scale;
  float* scores;   // room for queries x kKeyBlock
  float* largest;  // set, of each query: the largest score,
  float* sums;     // the sum of e^(score - largest),
  float* out;      // and that of the values times it, a row of `value_width`
};

// The kernels of few tokens: a matrix times a few vectors, read once from memory, and what is done to single vectors.
struct Gemv {
  const char* name;
  uint32_t needs;
  bool pairs;  // bfloat16 weights that allow it are multiplied as pairs

  // A vector of `width` values in the form in which it meets a matrix like `m`, and that form's bytes.
  int64_t (*prepared_bytes)(int64_t width, const Matrix& m);
  // To 8 bits (see Matrix) only where it is off by at most `limit` of its length.
  void (*prepare)(char* prepared, const float* x, int64_t width, const Matrix& m, float limit);
  // out[v * out_stride + r] = m[row + r] · x[v], for `rows` rows and `count` vectors.
  void (*multiply)(float* out, int64_t out_stride, const Matrix& m, int64_t row, int64_t rows,
                   const char* const* prepared, int count, int64_t width);
  // out[i] = act(gate[i], up[i]); up null: no gate. `out` may be `gate`.
  void (*activate)(float* out, const float* gate, const float* up, Activation kind, int64_t count);
  // y[i] = sum over k of weights[k] * rows[k][i], in that order; a null row is left out.
  void (*combine)(char* y, Type type, const float* const* rows, const float* weights, int count, int64_t width);
  // Rows of floats, or of a cache.
  void (*to_float)(float* out, const char* x, Type type, int64_t count);
  void (*from_float)(char* out, const float* x, Type type, int64_t count);
  // RMSNorm, x · weight / sqrt(mean(x²) + eps), of one row; the weight is of `type`. `out` may be `x`.
  void (*normalize)(float* out, const float* x, const char* weight, Type type, float eps, int64_t width);
  void (*attend)(const Attend& job);
  // `count` numbers become their softmax; returns the logarithm of the sum of their exponentials.
  float (*softmax)(float* numbers, int64_t count);
  // A router's scores: the softmax of `count` logits, or a sigmoid of each.
  void (*score)(float* out, const float* logits, bool sigmoids, int64_t count);
};

// The best tables of this process. They throw std::runtime_error where there is none: a CPU without AVX2, or
// HANDFUL_ISA=none. `bf16`: products may be of bfloat16 pairs, and those with codes of bytes.
const Gemm& gemm_for(bool bf16);
const Gemm& gemm_for(bool bf16, const Matrix& m);
const Gemv& gemv();
// Tokens up to which a matrix is multiplied by `gemv`; more are packed into panels.
int64_t gemv_max_tokens(const Matrix& m);
// Whether bfloat16 tokens that meet codes keep more than 8 bits a number: HANDFUL_EXACT_ACTIVATIONS=1, or as it was set.
bool exact_activations();
void set_exact_activations(bool on);

}  // namespace handful
