#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace handful {
namespace {

struct Block {
  void* data;
  int64_t bytes;
};

constexpr int64_t kKeptBytes = int64_t{256} << 20, kHugePage = int64_t{2} << 20;

// Never destroyed: threads may still hold buffers while the process ends.
struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;
  int64_t bytes = 0;
  int64_t lasting = 0, most_lasting = 0;  // bytes of tensors that live now, and that lived at once
};

Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

// Under the address sanitizer a buffer has the size that was asked for and is freed at once, so that no use beyond it
// goes unseen.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kExact = true;
#else
constexpr bool kExact = false;
#endif

void* allocate(int64_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, bytes >= kHugePage && !kExact ? kHugePage : 64, bytes) != 0) throw std::bad_alloc();
  use_huge_pages(data, bytes);
  return data;
}

}  // namespace

Buffer::Buffer(int64_t bytes) {
  if (bytes == 0) return;
  const int64_t grid = kExact ? 1 : bytes >= kHugePage ? kHugePage : 4096;
  bytes = (bytes + grid - 1) / grid * grid;
  {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    size_t best = all.blocks.size();
    for (size_t i = 0; i < all.blocks.size(); ++i) {
      const int64_t size = all.blocks[i].bytes;
      if (size >= bytes && size <= 2 * bytes && (best == all.blocks.size() || size < all.blocks[best].bytes)) best = i;
    }
    if (best < all.blocks.size()) {
      data_ = all.blocks[best].data;
      bytes_ = all.blocks[best].bytes;
      all.bytes -= bytes_;
      all.blocks[best] = all.blocks.back();
      all.blocks.pop_back();
      return;
    }
  }
  data_ = allocate(bytes);
  bytes_ = bytes;
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (kExact) {
    std::free(data_);
    return;
  }
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.blocks.push_back({data_, bytes_});
  all.bytes += bytes_;
  while (all.bytes > kKeptBytes + all.most_lasting) {  // the oldest first
    std::free(all.blocks.front().data);
    all.bytes -= all.blocks.front().bytes;
    all.blocks.erase(all.blocks.begin());
  }
}

Tensor lasting(const Shape& shape, ScalarType type, int64_t bytes) {
  Buffer buffer(std::max<int64_t>(bytes, 1));
  const int64_t held = buffer.bytes();
  {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.lasting += held;
    all.most_lasting = std::max(all.most_lasting, all.lasting);
  }
  void* const data = buffer.as<void>();
  auto owner = std::make_shared<Buffer>(std::move(buffer));
  auto give_back = [owner, held](void*) mutable {
    owner.reset();
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.lasting -= held;
  };
  const auto strides = shape.strides();
  const auto dims = static_cast<size_t>(shape.dims);
  return torch::stable::from_blob(data, {shape.sizes.data(), dims}, {strides.data(), dims},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type, give_back);
}

void use_huge_pages(void* data, int64_t bytes) {
  const auto first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

}  // namespace handful
