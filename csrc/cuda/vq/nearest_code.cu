// Launches nearest_code.cuh.
#include <optional>

#include "cuda/lib/launch.h"
#include "cuda/vq/nearest_code.cuh"

namespace emu3 {
namespace {

// Returns the codes padded to padded_dim floats and aligned to 16 bytes.
Tensor padded_codes(const Tensor& codebook) {
  const int64_t dim = codebook.size(1), padding = padded_dim(static_cast<int>(dim)) - dim;
  if (padding) return torch::stable::pad(codebook, {0, padding});
  const bool aligned = reinterpret_cast<uintptr_t>(codebook.const_data_ptr()) % sizeof(float4) == 0;
  return aligned ? codebook : torch::stable::clone(codebook);
}

template <typename T>
void launch(const Tensor& z, const Tensor& codes, const Tensor& ids) {
  const Latents<T> latents{static_cast<const T*>(z.const_data_ptr()),
                           z.size(0) * z.size(2),
                           z.size(2),
                           z.stride(0),
                           z.stride(1),
                           z.stride(2),
                           static_cast<int>(z.size(1))};
  const int32_t device = z.get_device();
  nearest_code(latents, num_multiprocessors(device), [&](auto kernel, unsigned num_blocks) {
    kernel<<<num_blocks, kThreads, 0, current_stream(device)>>>(
        latents, static_cast<const float4*>(codes.const_data_ptr()),
        static_cast<int>(codes.size(0)), static_cast<int64_t*>(ids.mutable_data_ptr()));
  });
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "nearest_code: ", cudaGetErrorString(error));
}

// z [batch, dim, positions] has any strides, codebook [codes, dim] is contiguous float32. The tree
// is used on the CPU only.
Tensor search_all(const Tensor& z, const Tensor& codebook, std::optional<Tensor>) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device());
  Tensor ids =
      torch::stable::new_empty(z, {z.size(0), z.size(2)}, torch::headeronly::ScalarType::Long);
  if (ids.numel() == 0) return ids;
  const Tensor codes = padded_codes(codebook);
  if (dtype_of(z) == Dtype::float32) {
    launch<float>(z, codes, ids);
  } else {
    launch<bfloat16>(z, codes, ids);
  }
  return ids;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CUDA, m) { m.impl("nearest_code", TORCH_BOX(&search_all)); }

}  // namespace emu3
