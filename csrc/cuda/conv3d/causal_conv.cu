// Launches causal_conv.cuh and temporal_residual.cuh.
#include <optional>
#include <vector>

#include "cuda/lib/launch.h"
#include "cuda/conv3d/temporal_residual.cuh"

namespace emu3 {
namespace {

const float* floats(const std::optional<Tensor>& x) {
  return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
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
  return {floats(weight), floats(bias), static_cast<int>(weight.size(2))};
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
  causal_conv(call, static_cast<int>(x.size(0)), static_cast<int>(weight.size(3)),
              [&](auto kernel, dim3 grid) {
                kernel<<<grid, kConvThreads, 0, current_stream(x.get_device())>>>(call);
              });
  check_launch("causal_conv3d");
}

// Arguments as of csrc/bindings/conv3d.cpp; the kernel is 1x1 or 3x3 in space, with stride 1 there.
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
  const Norm norm{floats(scale), floats(shift), silu};
  const auto run = dtype_of(x) == Dtype::float32 ? convolve<float> : convolve<bfloat16>;
  run(x, weight, bias, norm, residual, static_cast<int>(stride[0]), static_cast<int>(front),
      post_silu, y);
  return y;
}

template <typename T>
void run_block(const Tensor& x, const Norm& norm1, const Weights& first, const Norm& norm2,
               const Weights& second, const Tensor& y) {
  const int32_t device = x.get_device();
  const TemporalResidual<T> block{
      source<T>(x), video<T>(y.mutable_data_ptr(), y), first, second, norm1, norm2, 0};
  temporal_residual(block, static_cast<int>(x.size(0)), num_multiprocessors(device),
                    [&](auto kernel, dim3 grid, const TemporalResidual<T>& call) {
                      kernel<<<grid, kBlockThreads, 0, current_stream(device)>>>(call);
                    });
  check_launch("temporal_residual");
}

// One kernel for up to as many channels as a thread has accumulators for, two convolutions for
// more.
Tensor block(const Tensor& x, const Tensor& scale1, const Tensor& shift1, const Tensor& weight1,
             const Tensor& bias1, const Tensor& scale2, const Tensor& shift2, const Tensor& weight2,
             const Tensor& bias2) {
  if (x.size(1) > kDepth) {
    const Tensor hidden =
        forward(x, weight1, bias1, scale1, shift1, std::nullopt, {1, 1, 1}, 2, true, false);
    return forward(hidden, weight2, bias2, scale2, shift2, x, {1, 1, 1}, 2, true, false);
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  Tensor y = empty(x, x.sizes());
  if (y.numel() == 0) return y;
  const Norm norm1{floats(scale1), floats(shift1), true},
      norm2{floats(scale2), floats(shift2), true};
  const auto run = dtype_of(x) == Dtype::float32 ? run_block<float> : run_block<bfloat16>;
  run(x, norm1, weights(weight1, bias1), norm2, weights(weight2, bias2), y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CUDA, m) {
  m.impl("causal_conv_forward", TORCH_BOX(&forward));
  m.impl("temporal_residual", TORCH_BOX(&block));
}

}  // namespace emu3
