// How fast memory can be read.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace handful {

// Reads the uint8 tensor `buffer` from end to end with torch's threads, `repeats` times. Returns the median rate in
// bytes per second, and the sum of the buffer's 64-bit words (modulo 2^64), which shows that all of it was read.
std::tuple<double, int64_t> read_bandwidth(torch::stable::Tensor buffer, int64_t repeats);

}  // namespace handful
