// Memory for weights and scratch: aligned to cache lines, on large pages if the system has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace baton {

constexpr size_t LARGE_PAGE = size_t{1} << 21;

// An array that loses its content when it grows. Fresh memory is zero.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t count) { reserve(count); }
  Array(Array&& other) noexcept { swap(other); }
  Array& operator=(Array&& other) noexcept {
    swap(other);
    return *this;
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  T* reserve(size_t count) {
    if (count <= count_) return data_;
    size_t bytes = count * sizeof(T) + 64;  // kernels may read one line past the end
    const size_t alignment = bytes >= LARGE_PAGE ? LARGE_PAGE : 64;
    bytes = (bytes + 63) / 64 * 64;
    std::free(data_);
    data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes));
    if (!data_) {
      count_ = 0;
      throw std::bad_alloc();
    }
    if (alignment == LARGE_PAGE) madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: ordinary pages are as right
    std::memset(static_cast<void*>(data_), 0, bytes);
    count_ = count;
    return data_;
  }
  T* get() const { return data_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  void swap(Array& other) {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
  }
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Memory for weights, allocated piece by piece, on large pages: every step reads all of it, and with small pages page
// walks take a fifth of the time.
class Arena {
 public:
  // Zeros, valid as long as the arena. Consecutive pieces are mostly adjacent.
  uint8_t* take(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left_) grow(bytes);
    uint8_t* piece = next_;
    next_ += bytes, left_ -= bytes;
    return static_cast<uint8_t*>(std::memset(piece, 0, bytes));
  }

 private:
  void grow(size_t bytes) {
    constexpr size_t CHUNK = size_t{32} << 20;  // untouched pages take no memory
    const size_t size = (bytes + CHUNK - 1) / CHUNK * CHUNK;
    chunks_.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(LARGE_PAGE, size)));
    next_ = chunks_.back().get(), left_ = next_ ? size : 0;
    if (!next_) throw std::bad_alloc();
    madvise(next_, size, MADV_HUGEPAGE);  // a wish: ordinary pages are as right
  }
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<uint8_t, Free>> chunks_;
  uint8_t* next_ = nullptr;
  size_t left_ = 0;
};

// Memory that a product prefetches, a little with each group of weights, for reads after it: products leave the memory
// bus idle most of the time.
class Errand {
 public:
  static constexpr size_t STEP = 192;  // bytes with each group

  void clear() { pieces_.clear(), piece_ = at_ = total_ = 0; }
  void add(const uint8_t* from, size_t bytes) { pieces_.emplace_back(from, bytes), total_ += bytes; }
  size_t total() const { return total_; }

  // The next `bytes`, perhaps past a piece's end; null after the last piece.
  const uint8_t* next(size_t bytes) {
    if (piece_ == pieces_.size()) return nullptr;
    const auto [from, size] = pieces_[piece_];
    const uint8_t* found = from + at_;
    at_ += bytes;
    if (at_ >= size) piece_++, at_ = 0;
    return found;
  }

 private:
  std::vector<std::pair<const uint8_t*, size_t>> pieces_;
  size_t piece_ = 0, at_ = 0, total_ = 0;
};

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

}  // namespace baton
