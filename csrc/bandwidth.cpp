// How fast memory can be read.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "isa.h"
#include "tensors.h"

namespace handful {
namespace {

// Each thread reads four places of a block at once and asks for lines ahead: a core's own prefetchers stop at every
// page's end. Four places far apart are slower, by a fifth on some CPUs.
constexpr int64_t kStreams = 4, kLine = 64, kAhead = 256, kBlock = 1 << 20;  // bytes

uint64_t sum_plain(const char* data, int64_t bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(data);
  uint64_t sum = 0;
  for (int64_t i = 0; i < bytes / 8; ++i) sum += words[i];
  return sum;
}

__attribute__((target("avx2"))) uint64_t sum_avx2(const char* data, int64_t bytes) {
  const int64_t length = bytes / (kStreams * kLine) * kLine;
  __m256i low[kStreams] = {}, high[kStreams] = {};
  for (int64_t i = 0; i < length; i += kLine) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < kStreams; ++s) {
      const char* line = data + s * length + i;
      _mm_prefetch(line + kAhead, _MM_HINT_T0);
      low[s] = _mm256_add_epi64(low[s], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
      high[s] = _mm256_add_epi64(high[s], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + kLine / 2)));
    }
  }
  alignas(32) uint64_t lanes[4];
  uint64_t sum = sum_plain(data + kStreams * length, bytes - kStreams * length);
  for (int64_t s = 0; s < kStreams; ++s) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(low[s], high[s]));
    for (const uint64_t lane : lanes) sum += lane;
  }
  return sum;
}

#ifdef HANDFUL_EMULATE_AVX512
constexpr auto sum_avx512 = sum_avx2;
#else
__attribute__((target("avx512f"))) uint64_t sum_avx512(const char* data, int64_t bytes) {
  const int64_t length = bytes / (kStreams * kLine) * kLine;
  __m512i sums[kStreams] = {};
  for (int64_t i = 0; i < length; i += kLine) {
#pragma GCC unroll 4
    for (int64_t s = 0; s < kStreams; ++s) {
      const char* line = data + s * length + i;
      _mm_prefetch(line + kAhead, _MM_HINT_T0);
      sums[s] = _mm512_add_epi64(sums[s], _mm512_loadu_si512(line));
    }
  }
  alignas(64) uint64_t lanes[8];
  uint64_t sum = sum_plain(data + kStreams * length, bytes - kStreams * length);
  for (const __m512i& stream : sums) {
    _mm512_store_si512(lanes, stream);
    for (const uint64_t lane : lanes) sum += lane;
  }
  return sum;
}
#endif

// Reads the uint8 tensor `buffer` from end to end with torch's threads, `repeats` times. Returns the median rate in
// bytes per second, and the sum of the buffer's 64-bit words (modulo 2^64), which shows that all of it was read.
std::tuple<double, int64_t> read_bandwidth(Tensor buffer, int64_t repeats) {
  STD_TORCH_CHECK(buffer.scalar_type() == ScalarType::Byte, "buffer is not of type uint8");
  STD_TORCH_CHECK(buffer.is_contiguous(), "buffer is not contiguous");
  STD_TORCH_CHECK(buffer.numel() > 0 && buffer.numel() % 8 == 0, "buffer's size is not a multiple of 8");
  STD_TORCH_CHECK(repeats >= 1, "repeats = ", repeats, ": at least 1");

  const auto sum = has(kAvx512) ? sum_avx512 : has(kAvx2) ? sum_avx2 : sum_plain;
  const auto* data = static_cast<const char*>(buffer.const_data_ptr());

  std::vector<double> rates;
  uint64_t total = 0;
  for (int64_t r = 0; r < repeats; ++r) {
    std::atomic<uint64_t> shared{0};
    const auto start = std::chrono::steady_clock::now();
    torch::stable::parallel_for(0, buffer.numel() / 8, 1, [&](int64_t begin, int64_t end) {
      uint64_t mine = 0;
      for (int64_t b = 8 * begin; b < 8 * end; b += kBlock) mine += sum(data + b, std::min(kBlock, 8 * end - b));
      shared += mine;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    rates.push_back(static_cast<double>(buffer.numel()) / seconds.count());
    total = shared;
  }
  std::nth_element(rates.begin(), rates.begin() + rates.size() / 2, rates.end());
  return {rates[rates.size() / 2], static_cast<int64_t>(total)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(handful, m) { m.def("read_bandwidth(Tensor buffer, int repeats) -> (float, int)"); }

STABLE_TORCH_LIBRARY_IMPL(handful, CPU, m) { m.impl("read_bandwidth", TORCH_BOX(&read_bandwidth)); }

}  // namespace handful
