// The tables of all levels, among which levels.cpp chooses for the CPU.
//
// A level's file is BEGIN_LEVEL(instructions), functions, and END_LEVEL(table). The macros switch the instructions on,
// and put the functions into an unnamed namespace and the table among the constants: a function that the linker may
// give to another file, or a constructor that runs before the CPU was asked, would be an illegal instruction elsewhere.
#pragma once

// What levels use of the standard library, whose templates must be compiled for the baseline.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "isa.h"
#include "kernels.h"

#define PRAGMA(TEXT) _Pragma(#TEXT)
#ifdef __clang__
#define PUSH_TARGET(INSTRUCTIONS) \
  PRAGMA(clang attribute push(__attribute__((target(INSTRUCTIONS))), apply_to = function))
#define POP_TARGET PRAGMA(clang attribute pop)
#else
// gcc 12 warns of its own intrinsics' undefined operands.
#define PUSH_TARGET(INSTRUCTIONS) \
  PRAGMA(GCC push_options) \
  PRAGMA(GCC target(INSTRUCTIONS)) \
  PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized")
#define POP_TARGET PRAGMA(GCC pop_options)
#endif

#if defined(HANDFUL_EMULATE_AVX512) || defined(HANDFUL_EMULATE_AVX_VNNI) || defined(HANDFUL_EMULATE_AMX)
#include "emulated.h"
#endif

#ifdef HANDFUL_EMULATE_AVX512  // with none but these, whatever a level asks for
#define LEVEL_TARGET(INSTRUCTIONS) PUSH_TARGET("avx2,fma,f16c")
#else
#define LEVEL_TARGET(INSTRUCTIONS) PUSH_TARGET(INSTRUCTIONS)
#endif

#define BEGIN_LEVEL(INSTRUCTIONS) \
  LEVEL_TARGET(INSTRUCTIONS)      \
  namespace handful {             \
  namespace {
#define END_LEVEL(...)   \
  }                      \
  constexpr __VA_ARGS__; \
  }                      \
  POP_TARGET

namespace handful {

extern const Gemm kAvx2Gemm, kAvx512Gemm, kAvx512Bf16Gemm;
extern const Gemv kAvx2Gemv, kAvxVnniGemv, kAvx512Gemv, kAvx512VnniGemv, kAvx512VnniBf16Gemv;

// What differs from kAvx512Bf16Gemm with AMX.
struct AmxGemm {
  uint32_t needs;
  void (*begin)();
  void (*end)();
  void (*multiply)(const Product& job);
};
extern const AmxGemm kAmxGemm;

// What differs from a float32 table where codes are multiplied as bytes.
struct ByteGemm {
  const char* name;  // null: there is none
  uint32_t needs;
  void (*pack_rows)(uint32_t* left, const Matrix& m, int64_t row, int rows, int64_t k0, int count);
  void (*multiply)(const Product& job);
  void (*quantize)(uint32_t* panel, const float* values, int64_t width, float limit);
  Limits limits;
  void (*begin)() = nullptr;  // null: as before
  void (*end)() = nullptr;
};
// Of int8 and int4, with tokens of 8 bits a number, and exact ones of 9 with VNNI.
struct ByteGemms {
  ByteGemm int8, int4, exact_int8, exact_int4;
};
extern const ByteGemms kAvx2Bytes, kAvxVnniBytes, kAvx512Bytes, kAvx512VnniBytes, kAmxBytes;

// A CPU's tables: GEMM for float32, for bfloat16, and for codes with bfloat16 tokens, rounded to 8 bits or exact; GEMV for
// all.
struct Chosen {
  const Gemm* float32;
  const Gemm* bfloat16;
  const Gemm *int8, *int4;
  const Gemm *exact_int8, *exact_int4;
  const Gemv* gemv;
};

// The best that the features cover. Throws std::runtime_error where no level is.
Chosen choose(uint32_t features);

}  // namespace handful
