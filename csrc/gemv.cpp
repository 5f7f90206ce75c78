#include "gemv.h"

namespace handful {

void Prepared::fill(int64_t i, const char* x, Type type) const {
  if (type == Type::kFloat32) return fill(i, reinterpret_cast<const float*>(x));
  const Buffer wide(width_ * 4);
  gemv().to_float(wide.as<float>(), x, type, width_);
  fill(i, wide.as<float>());
}

void add_gemv_items(std::vector<GemvItem>& items, const Stack& stack, int64_t matrices, int64_t matrix, int64_t first,
                    int count) {
  // About 32 items of all matrices. A short one does not pay, since memory is slow at its beginning; the last of long
  // ones is waited for.
  const int64_t bytes = std::clamp<int64_t>(matrices * stack.bytes() / 32, 32 << 10, 512 << 10);
  const int64_t row_bytes = stack.bytes() / stack.rows;
  const int64_t some = std::max<int64_t>(bytes / row_bytes / 16 * 16, 16);
  for (int64_t r = 0; r < stack.rows; r += some) {
    items.push_back({static_cast<int>(matrix), count, first, r, std::min(some, stack.rows - r)});
  }
}

void taper(std::vector<GemvItem>& items) {
  constexpr size_t kLast = 4;
  constexpr int64_t kParts = 4, kLeast = 64;  // rows: fewer would make many short streams
  if (items.size() < 2 * kLast) return;
  const std::vector<GemvItem> last(items.end() - kLast, items.end());
  items.resize(items.size() - kLast);
  for (const GemvItem& item : last) {
    const int64_t some = std::max((item.rows / kParts + 15) / 16 * 16, kLeast);
    for (int64_t r = 0; r < item.rows; r += some) {
      items.push_back({item.matrix, item.count, item.first, item.row + r, std::min(some, item.rows - r)});
    }
  }
}

}  // namespace handful
