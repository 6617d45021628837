// Shared by all launches of CUDA kernels: the current stream of torch and the number of SMs. The
// library builds against any torch, with or without CUDA, and can be imported without a driver: the
// CUDA runtime is linked statically, and the one function that only CUDA builds of torch have is
// looked up at the first launch.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings/torch_stable.h"

namespace emu3 {

inline cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t device, void** stream);  // 0 for success
  static const Getter get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found =
        dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Getter>(found);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get && get(device, &stream) == 0,
                  "emu3_kernels: torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline int num_multiprocessors(int32_t device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(error == cudaSuccess, "emu3_kernels: ", cudaGetErrorString(error));
  return count;
}

}  // namespace emu3
