// Memory for weights and scratch: aligned to cache lines, on large pages where the system gives them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace baton {

// An array that is grown, never copied: growing loses what was in it. Fresh memory is zero.
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
    constexpr size_t LARGE_PAGE = size_t{1} << 21;
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

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

}  // namespace baton
