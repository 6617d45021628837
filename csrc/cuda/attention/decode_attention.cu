// Launches decode_attention.cuh.
#include "cuda/attention/decode_attention.cuh"

#include <optional>

#include "cuda/lib/launch.h"

namespace emu3 {
namespace {

template <typename T>
DecodeHeads<T> heads(const Tensor& x) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % sizeof(Vector) == 0,
                  "decode_attention: heads must be aligned to 16 bytes");
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
void launch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
            const std::optional<Tensor>& table, const std::optional<Tensor>& mask, double scale,
            const Tensor& out) {
  constexpr double kLog2E = 1.4426950408889634;
  const int64_t batch = q.size(0), kv_heads = k.size(2), head_dim = q.size(3);
  const int64_t rows = q.size(1) * q.size(2) / kv_heads;
  const int64_t capacity = k.size(1) * (table ? table->size(1) : 1);
  const int32_t device = q.get_device();
  const int splits = decode_splits(batch, static_cast<int>(kv_heads), static_cast<int>(rows),
                                   capacity, num_multiprocessors(device));
  using torch::headeronly::ScalarType;
  const int64_t results = batch * kv_heads * splits * rows;
  Tensor partial = torch::stable::new_empty(q, {results * head_dim}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(q, {results}, ScalarType::Float);
  const Decode<T> call{
      heads<T>(q),
      heads<T>(k),
      heads<T>(v),
      static_cast<const int32_t*>(lengths.const_data_ptr()),
      table ? static_cast<const int32_t*>(table->const_data_ptr()) : nullptr,
      mask ? static_cast<const uint64_t*>(mask->const_data_ptr()) : nullptr,
      table ? table->stride(0) : 0,
      static_cast<int>(k.size(1)),
      static_cast<int>(q.size(1)),
      static_cast<int>(q.size(2) / kv_heads),
      static_cast<int>(kv_heads),
      splits,
      static_cast<float>(scale * kLog2E),
      static_cast<float*>(partial.mutable_data_ptr()),
      static_cast<float*>(lse.mutable_data_ptr()),
      static_cast<T*>(out.mutable_data_ptr()),
  };
  decode_attention(call, static_cast<int>(head_dim), batch, [&](auto kernel, dim3 grid) {
    kernel<<<grid, kDecodeThreads, 0, current_stream(device)>>>(call);
  });
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "decode_attention: ", cudaGetErrorString(error));
}

// Arguments as of csrc/bindings/attention.cpp; K must be 64 or 128 and every head aligned to 16
// bytes.
Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
              const std::optional<Tensor>& table, const std::optional<Tensor>& mask, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device());
  Tensor out = torch::stable::new_empty(q, q.sizes());
  if (out.numel() == 0) return out;
  if (dtype_of(q) == Dtype::float32) {
    launch<float>(q, k, v, lengths, table, mask, scale, out);
  } else {
    launch<bfloat16>(q, k, v, lengths, table, mask, scale, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CUDA, m) { m.impl("decode_attention", TORCH_BOX(&decode)); }

}  // namespace emu3
