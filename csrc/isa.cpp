#include "isa.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace handful {
namespace {

struct Named {
  uint32_t bits;
  const char* name;
};

constexpr Named kFeatures[] = {
    {kAvx2, "avx2"},
    {kAvxVnni, "avx_vnni"},
    {kAvx512, "avx512"},
    {kAvx512Vnni, "avx512_vnni"},
    {kAvx512Bf16, "avx512_bf16"},
    {kAmxBf16, "amx_bf16"},
    {kAmxInt8, "amx_int8"},
};

// What each level adds to the one before it.
constexpr Named kLevels[] = {
    {0, "none"},
    {kAvx2, "avx2"},
    {kAvxVnni, "avx_vnni"},
    {kAvx512, "avx512f"},
    {kAvx512Vnni | kAvx512Bf16, "avx512"},
    {kAmxBf16 | kAmxInt8, "amx"},
};

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros for a leaf that is not there
  return r;
}

bool bit(unsigned value, int index) { return (value >> index) & 1; }

// The register states that the operating system saves when it switches threads.
__attribute__((target("xsave"))) uint64_t saved_states() { return _xgetbv(0); }

// Linux gives a process AMX's 8 KiB of tile state only when asked, once for all its threads.
bool amx_granted() {
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
}

uint32_t detect() {
  const Registers base = cpuid(1, 0), more = cpuid(7, 0), newer = cpuid(7, 1);
  const bool osxsave = bit(base.ecx, 27);
  if (!osxsave) return 0;
  const uint64_t states = saved_states();
  const auto saves = [&](uint64_t mask) { return (states & mask) == mask; };

  uint32_t found = 0;
  const bool fma = bit(base.ecx, 12), f16c = bit(base.ecx, 29);
  if (!saves(0x6) || !bit(more.ebx, 5) || !fma || !f16c) return found;
  found |= kAvx2;
#ifdef HANDFUL_EMULATE_AVX_VNNI
  found |= kAvxVnni;
#endif
  if (bit(newer.eax, 4)) found |= kAvxVnni;

#ifdef HANDFUL_EMULATE_AVX512
  found |= kAvx512 | kAvx512Vnni | kAvx512Bf16;
#else
  const bool avx512 = bit(more.ebx, 16) && bit(more.ebx, 17) && bit(more.ebx, 30) && bit(more.ebx, 31);
  if (!saves(0xe6) || !avx512) return found;
  found |= kAvx512;
  if (bit(more.ecx, 11)) found |= kAvx512Vnni;
  if (bit(newer.eax, 5)) found |= kAvx512Bf16;
#endif

  // Every CPU with AMX has bfloat16 vectors, which do all but AMX's product.
  if ((found & kAvx512Bf16) == 0) return found;
#ifdef HANDFUL_EMULATE_AMX
  return found | kAmxBf16 | kAmxInt8;
#endif
  if (!saves(0x600e6) || !bit(more.edx, 24) || !amx_granted()) return found;
  if (bit(more.edx, 22)) found |= kAmxBf16;
  if (bit(more.edx, 25)) found |= kAmxInt8;
  return found;
}

// Keeps the features up to the level that HANDFUL_ISA names; it cannot name one that is not there.
uint32_t limit(uint32_t found) {
  const char* forced = std::getenv("HANDFUL_ISA");
  if (forced == nullptr || *forced == '\0') return found;
  uint32_t allowed = 0;
  std::string here;
  for (const Named& level : kLevels) {
    if (level.bits != 0 && (found & level.bits) == 0) continue;
    allowed |= level.bits;
    if (!here.empty()) here += ", ";
    here += level.name;
    if (std::strcmp(level.name, forced) == 0) return found & allowed;
  }
  throw std::runtime_error("HANDFUL_ISA = '" + std::string(forced) + "': one of " + here + " on this computer");
}

}  // namespace

uint32_t features() {
  static const uint32_t mask = limit(detect());
  return mask;
}

std::string names_of(uint32_t features) {
  std::string names;
  for (const Named& feature : kFeatures) {
    if ((features & feature.bits) == 0) continue;
    if (!names.empty()) names += ' ';
    names += feature.name;
  }
  return names;
}

uint32_t features_of(const std::string& names) {
  uint32_t features = 0;
  std::istringstream words(names);
  for (std::string word; words >> word;) {
    const auto* named = std::find_if(std::begin(kFeatures), std::end(kFeatures),
                                     [&](const Named& feature) { return word == feature.name; });
    if (named == std::end(kFeatures)) throw std::runtime_error("there is no feature '" + word + "'");
    features |= named->bits;
  }
  return features;
}

}  // namespace handful
