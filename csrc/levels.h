// The kernels of every level that is compiled in; levels.cpp chooses among those that the CPU has.
//
// A level's file lies between BEGIN_LEVEL, which switches its instructions on, and END_LEVEL, and has an unnamed
// namespace for all of its functions: one that another file could be given instead of its own copy, or that runs before
// the CPU was asked, would be an illegal instruction elsewhere. What it gives away is tables of constants, each with the
// features that it needs.
#pragma once

#include "isa.h"
#include "kernels.h"

#define PRAGMA(TEXT) _Pragma(#TEXT)
#ifdef __clang__
#define BEGIN_LEVEL(INSTRUCTIONS) \
  PRAGMA(clang attribute push(__attribute__((target(INSTRUCTIONS))), apply_to = function))
#define END_LEVEL PRAGMA(clang attribute pop)
#else
// gcc 12 warns of its own intrinsics' undefined operands.
#define BEGIN_LEVEL(INSTRUCTIONS) \
  PRAGMA(GCC push_options) \
  PRAGMA(GCC target(INSTRUCTIONS)) \
  PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized")
#define END_LEVEL PRAGMA(GCC pop_options)
#endif

namespace handful {

extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;
extern const Stream kAvx2Stream, kAvx512Stream, kAvx512VnniStream, kAvx512PairsStream;

// What AMX does otherwise than kAvx512Bf16Kernels.
struct Tiles {
  uint32_t needs;
  void (*begin)();
  void (*end)();
  void (*multiply)(const Product& job);
};
extern const Tiles kAmxTiles;

// What codes that are multiplied as bytes have otherwise than kAvx512Kernels.
struct Bytes {
  uint32_t needs;
  void (*pack_rows)(uint32_t* left, const Matrix& m, int64_t row, int rows, int64_t k0, int count);
  void (*multiply)(const Product& job);
  void (*quantize)(uint32_t* panel, const float* values, int64_t width, float limit);
};
extern const Bytes kAvx512VnniBytes;

// What is multiplied with: one or few tokens by `stream`, others by `kernels` for float32, bfloat16, and codes with
// bfloat16 tokens.
struct Chosen {
  const Kernels* float32;
  const Kernels* bfloat16;
  const Kernels* codes;
  const Stream* stream;
};

// The best that the features cover. Throws std::runtime_error where no level is.
Chosen choose(uint32_t features);

}  // namespace handful
