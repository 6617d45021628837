// Shared by all bindings: the stable ABI, dtypes, checks, allocation, dropout, streaming stores.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "cpu/lib/dropout.h"
#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

using torch::stable::Tensor;

// Raises a ValueError in Python (torch translates std::invalid_argument) unless `condition` holds.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Dtype dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "emu3_kernels: dtype must be float32 or bfloat16");
  return type == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
}

inline const char* at(const Tensor& tensor, int64_t element) {
  return static_cast<const char*>(tensor.const_data_ptr()) + element * tensor.element_size();
}

inline char* mutable_at(const Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + element * tensor.element_size();
}

// Advises huge pages if at least two fit. The first touch of memory costs 0.4 ns a byte with small
// pages, a quarter of that with huge ones, and later accesses miss the TLB less.
inline void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin + kHugePage < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void advise_huge_pages(const Tensor& memory) {
  advise_huge_pages(memory.mutable_data_ptr(), memory.numel() * memory.element_size());
}

// As torch::stable::new_empty, which looks up the operator by name: that takes as long as the norm
// of one decoded token. `dtype` is that of `like` by default.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                    std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  int32_t type, layout, device, index;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (dtype) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(),
                                                          static_cast<int64_t>(sizes.size()), &type,
                                                          &layout, &device, index, nullptr, &made));
  const Tensor result(made);
  int64_t count = 1;  // numel() of a tensor takes longer
  for (const int64_t size : sizes) count *= size;
  if (count >= 1 << 20 && device == aoti_torch_device_type_cpu()) advise_huge_pages(result);
  return result;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Returns scratch memory, aligned to a cache line, or to a huge page if it fills one.
inline std::unique_ptr<float, Free> uninitialised(int64_t count) {
  constexpr size_t kLine = 64, kHugePage = 2 << 20;
  const size_t bytes = count * sizeof(float), unit = bytes < kHugePage ? kLine : kHugePage;
  const size_t whole = (bytes + unit - 1) / unit * unit;
  void* const memory = std::aligned_alloc(unit, whole);
  if (!memory) throw std::bad_alloc();
  advise_huge_pages(memory, whole);
  return std::unique_ptr<float, Free>(static_cast<float*>(memory));
}

// drop_below() and keep_scale() of emu3_kernels/runtime/dropout.py; `seed` is 0-d int64, `rows`
// contiguous int64.
inline Dropout dropout_of(double p, const Tensor& seed, const std::optional<Tensor>& rows) {
  const double below = __builtin_nearbyint(p * 4294967296.0);
  return {
      .seed = *static_cast<const uint64_t*>(seed.const_data_ptr()),
      .drop_below = below < 4294967295.0 ? static_cast<uint32_t>(below) : 0xffffffff,
      .scale = static_cast<float>(1 / (1 - p)),
      .rows = rows ? static_cast<const int64_t*>(rows->const_data_ptr()) : nullptr,
  };
}

// Returns whether to write a result with streaming stores: only if it overflows the caches, since a
// smaller one is likely to be read soon.
inline bool past_caches(const Tensor& result) {
  constexpr int64_t kBytes = 16 << 20;
  return result.numel() * static_cast<int64_t>(result.element_size()) >= kBytes;
}

// The least number of rows of one thread: at least 32,768 elements.
inline int64_t row_grain(int64_t width) { return 1 + 32767 / (width > 0 ? width : 1); }

}  // namespace emu3
