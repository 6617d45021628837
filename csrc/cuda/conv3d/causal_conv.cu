// Launches causal_conv.cuh.
#include <optional>
#include <vector>

#include "cuda/lib/launch.h"
#include "cuda/conv3d/causal_conv.cuh"

namespace emu3 {
namespace {

Parameter parameter(const std::optional<Tensor>& x) {
  if (!x) return {};
  return {x->const_data_ptr(), dtype_of(*x) == Dtype::bfloat16};
}

template <typename T>
Video<T> video(void* data, const Tensor& x) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % sizeof(Quad<T>) == 0;
  return {static_cast<T*>(data),       static_cast<int>(x.size(1)),
          static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
          static_cast<int>(x.size(4)), aligned && x.size(4) % kQuad == 0};
}

template <typename T>
Video<const T> source(const Tensor& x) {
  const Video<T> same = video<T>(const_cast<void*>(x.const_data_ptr()), x);
  return {same.data, same.channels, same.frames, same.height, same.width, same.aligned};
}

Weights weights(const Tensor& weight, const std::optional<Tensor>& bias) {
  return {parameter(weight), parameter(bias), static_cast<int>(weight.size(2))};
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

template <typename T>
void convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const Norm& norm, const std::optional<Tensor>& residual, int stride, int front,
              bool post_silu, const Tensor& y) {
  const CausalConv<T> call{source<T>(x),
                           residual ? source<T>(*residual) : Video<const T>{},
                           video<T>(y.mutable_data_ptr(), y),
                           weights(weight, bias),
                           norm,
                           stride,
                           front,
                           post_silu};
  const int32_t device = x.get_device();
  causal_conv(call, static_cast<int>(x.size(0)), static_cast<int>(weight.size(3)),
              num_multiprocessors(device), [&](auto kernel, dim3 grid) {
                kernel<<<grid, kConvThreads, 0, current_stream(device)>>>(call);
              });
  check_launch("causal_conv3d");
}

// Arguments as of csrc/bindings/conv3d.cpp, the parameters in float32 or bfloat16; the kernel is
// 1x1 or 3x3 in space, with stride 1 there.
Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
               const std::optional<Tensor>& residual, std::vector<int64_t> stride, int64_t front,
               bool silu, bool post_silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const int64_t frames = x.size(2) + front - weight.size(2) + stride[0];
  const std::vector<int64_t> sizes{x.size(0), weight.size(0), frames < 0 ? 0 : frames / stride[0],
                                   x.size(3), x.size(4)};
  Tensor y = empty(x, sizes);
  if (y.numel() == 0) return y;
  const Norm norm{parameter(scale), parameter(shift), silu};
  const auto run = dtype_of(x) == Dtype::float32 ? convolve<float> : convolve<bfloat16>;
  run(x, weight, bias, norm, residual, static_cast<int>(stride[0]), static_cast<int>(front),
      post_silu, y);
  return y;
}

// Two kernels: one that recomputes the hidden frames around a tile takes three times as long
// (measured on an H200), as few blocks have long chains of frames.
Tensor block(const Tensor& x, const Tensor& scale1, const Tensor& shift1, const Tensor& weight1,
             const Tensor& bias1, const Tensor& scale2, const Tensor& shift2, const Tensor& weight2,
             const Tensor& bias2) {
  const Tensor hidden =
      forward(x, weight1, bias1, scale1, shift1, std::nullopt, {1, 1, 1}, 2, true, false);
  return forward(hidden, weight2, bias2, scale2, shift2, x, {1, 1, 1}, 2, true, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CUDA, m) {
  m.impl("causal_conv_forward", TORCH_BOX(&forward));
  m.impl("temporal_residual", TORCH_BOX(&block));
}

}  // namespace emu3
