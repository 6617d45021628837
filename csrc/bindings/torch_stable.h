// What every file that knows torch shares: the stable ABI, dtypes, row views, dropout, when a
// result is large.
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

// Raises Python's ValueError, which std::invalid_argument becomes on its way there.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline Dtype dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "emu3_kernels: the native kernels take float32 and bfloat16");
  return type == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
}

inline const char* at(const Tensor& tensor, int64_t element) {
  return static_cast<const char*>(tensor.const_data_ptr()) + element * tensor.element_size();
}

inline char* mutable_at(const Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + element * tensor.element_size();
}

// Asks for large pages where as many as two fit: the small ones of fresh memory cost 0.4 ns a byte
// when they are first touched, these a quarter, and memory is read faster through fewer of them.
inline void use_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (begin + kPage < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline void use_large_pages(const Tensor& memory) {
  use_large_pages(memory.mutable_data_ptr(), memory.numel() * memory.element_size());
}

// Uninitialised, of the dtype of `like` by default. By the allocator's own entry:
// torch::stable::new_empty looks the operator up by its name, which takes as long as the norm of a
// decoded token.
inline Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
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
  int64_t count = 1;  // to ask a tensor for it takes longer
  for (const int64_t size : sizes) count *= size;
  if (count >= 1 << 20 && device == aoti_torch_device_type_cpu()) use_large_pages(result);
  return result;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Scratch memory, aligned to a cache line, and to a page where it is large.
inline std::unique_ptr<float, Free> uninitialised(int64_t count) {
  constexpr size_t kLine = 64, kLargePage = 2 << 20;
  const size_t bytes = count * sizeof(float), unit = bytes < kLargePage ? kLine : kLargePage;
  const size_t whole = (bytes + unit - 1) / unit * unit;
  void* const memory = std::aligned_alloc(unit, whole);
  if (!memory) throw std::bad_alloc();
  use_large_pages(memory, whole);
  return std::unique_ptr<float, Free>(static_cast<float*>(memory));
}

// drop_below() and keep_scale() of _dropout.py; the seed is 0-d int64.
inline Dropout dropout_of(double p, const Tensor& seed) {
  const double below = __builtin_nearbyint(p * 4294967296.0);
  return {
      .seed = *static_cast<const uint64_t*>(seed.const_data_ptr()),
      .drop_below = below < 4294967295.0 ? static_cast<uint32_t>(below) : 0xffffffff,
      .scale = static_cast<float>(1 / (1 - p)),
  };
}

// A result that overflows the caches is written past them; a smaller one is soon read again.
inline bool past_caches(const Tensor& result) {
  constexpr int64_t kBytes = 16 << 20;
  return result.numel() * static_cast<int64_t>(result.element_size()) >= kBytes;
}

// Rows one thread takes at the least, so that it has 32,768 elements to work on.
inline int64_t row_grain(int64_t width) { return 1 + 32767 / (width > 0 ? width : 1); }

}  // namespace emu3
