// Memory and threads of one operation.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "tensors.h"

namespace handful {

// Scratch memory, 64-byte aligned and not cleared. Freed blocks are kept for the next operation, up to a limit in all,
// because the system clears every fresh page, which costs more than filling it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// The same as a tensor's memory, from the forward pass to the backward pass. As much as lived at once is kept for the
// next step beside the rest.
Tensor lasting(const Shape& shape, ScalarType type, int64_t bytes);

// Some values of which there are mostly few: they are allocated only beyond `kFew`.
template <class T, int64_t kFew = 16>
class Some {
 public:
  explicit Some(int64_t count) : many_(count > kFew ? count : 0), at_(count > kFew ? many_.data() : few_.data()) {}
  Some(const Some&) = delete;
  Some& operator=(const Some&) = delete;

  T* data() { return at_; }
  T& operator[](int64_t i) { return at_[i]; }

 private:
  std::array<T, kFew> few_;
  std::vector<T> many_;
  T* at_;
};

// Asks for huge pages in a large block before it is first written: the system clears 2 MiB at once, and not 4 KiB at
// each of 512 faults.
void use_huge_pages(void* data, int64_t bytes);

// What a number of a row that is read and written costs, in nanoseconds: a guess for `each`.
constexpr double kRowCost = 0.5;

// Calls work(i) for every i below `items`, on torch's threads, each taking the next that is left. What an item writes
// must not depend on the others. `cost`: about how many nanoseconds one takes.
template <class Work>
void each(int64_t items, double cost, const Work& work) {
  constexpr double kWorthAThread = 20e3;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || items <= 1 || static_cast<double>(items) * cost < kWorthAThread) {
    for (int64_t i = 0; i < items; ++i) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < items ? threads : items, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < items; i = next++) work(i);
  });
}

}  // namespace handful
