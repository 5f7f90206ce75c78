// What this CPU can compute with, as far as the operating system grants it and HANDFUL_ISA allows it.
#pragma once

#include <cstdint>
#include <string>

namespace handful {

// Tables need these one by one. A level (avx2, avx512, amx) is a run of them that HANDFUL_ISA can cut off.
enum Feature : uint32_t {
  kAvx2 = 1u << 0,  // with FMA and F16C
  kAvxVnni = 1u << 1,
  kAvx512 = 1u << 2,  // F, BW, DQ and VL
  kAvx512Vnni = 1u << 3,
  kAvx512Bf16 = 1u << 4,
  kAmxBf16 = 1u << 5,
  kAmxInt8 = 1u << 6,
};

// The features of this process, found at the first call. Throws std::runtime_error for a wrong HANDFUL_ISA.
uint32_t features();

inline bool covers(uint32_t features, uint32_t needed) { return (features & needed) == needed; }

inline bool has(Feature feature) { return covers(features(), feature); }

// Names of features, separated by spaces: "avx2 avx512 avx512_vnni".
std::string names_of(uint32_t features);
// And back. Throws std::runtime_error for a name that there is not.
uint32_t features_of(const std::string& names);

}  // namespace handful
