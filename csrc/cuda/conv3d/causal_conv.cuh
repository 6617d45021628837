// Causal convolutions of few channels on a GPU, in float32 on the CUDA cores: at the 4 channels of
// Emu3, three quarters of a 16-wide tensor core tile would be padding. A thread computes four
// columns of a row for all output channels. Frames are staged in shared memory, four channels at a
// time, with norm and SiLU applied. Every sum goes through the frames of the kernel from the
// earliest on, so that it does not depend on where a chunk of a video begins; both kernels sum in
// the same order. Includes no torch header; tests/gates/fibers/fiber.h compiles this file for the
// CPU.
#pragma once

#include <stdint.h>

#include "cuda/lib/element.cuh"

namespace emu3 {

constexpr int kColumns = 32, kQuad = 4;  // of a tile, of a thread
constexpr int kDepth = 4;                // channels that are staged at a time
constexpr int kConvRows = 16, kConvThreads = kConvRows * kColumns / kQuad;

template <typename T>
struct alignas(kQuad * sizeof(T)) Quad {
  T at[kQuad];
};

// [batch, channels, frames, height, width], contiguous. `aligned`: every row starts at a Quad.
template <typename T>
struct Video {
  T* data;
  int channels, frames, height, width;
  bool aligned;

  __device__ T* row(int64_t batch, int channel, int frame, int y) const {
    return data + (((batch * channels + channel) * frames + frame) * height + y) * width;
  }
};

struct Norm {
  const float *scale, *shift;  // [channels] or null
  bool silu;

  __device__ float operator()(float x, int channel) const {
    if (scale) x = fmaf(scale[channel], x, shift[channel]);
    return silu ? x / (1.0f + expf(-x)) : x;
  }
};

struct Weights {
  const float *weight, *bias;  // [out, in, frames, K, K], [out] or null
  int frames;
};

template <typename T>
__device__ void load_quad(const T* row, int column, int width, bool aligned, float* to) {
  if (aligned && column >= 0 && column < width) {
    const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(row + column);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) to[i] = to_float(quad.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      to[i] = !aligned && column + i >= 0 && column + i < width ? to_float(row[column + i]) : 0.0f;
  }
}

template <typename T>
__device__ void store_quad(T* row, int column, int width, bool aligned, const float* from) {
  if (aligned) {
    Quad<T> quad;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) from_float(from[i], &quad.at[i]);
    *reinterpret_cast<Quad<T>*>(row + column) = quad;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (column + i < width) from_float(from[i], &row[column + i]);
  }
}

// Four channels of a part of a frame after norm and activation, with zeros outside the frame, as
// [kDepth, kRows, kQuads * 4] floats.
template <int kRows, int kQuads>
struct Patch {
  static constexpr int kPitch = kQuads * kQuad;
  float4 quads[kDepth * kRows * kQuads];

  __device__ float* at(int channel, int row, int quad) {
    return reinterpret_cast<float*>(quads + (channel * kRows + row) * kQuads + quad);
  }

  // Stages rows from y0 on, columns from x0 on (a multiple of four) and channels from c0 on.
  template <typename T>
  __device__ void stage(const Video<const T>& x, int64_t batch, int frame, int c0, int y0, int x0,
                        const Norm& norm, int threads) {
    for (int i = threadIdx.x; i < kDepth * kRows * kQuads; i += threads) {
      const int channel = c0 + i / (kRows * kQuads), y = y0 + i / kQuads % kRows;
      const int column = x0 + i % kQuads * kQuad;
      float value[kQuad] = {};
      if (channel < x.channels && y >= 0 && y < x.height) {
        load_quad(x.row(batch, channel, frame, y), column, x.width, x.aligned, value);
#pragma unroll
        for (int j = 0; j < kQuad; ++j)
          if (column + j >= 0 && column + j < x.width) value[j] = norm(value[j], channel);
      }
      quads[i] = make_float4(value[0], value[1], value[2], value[3]);
    }
  }
};

// Stages the weights of a frame of the kernel for channels from c0 on, [K, kDepth, K, kOut], padded
// with zeros.
template <int kOut, int K>
__device__ void stage_weights(const Weights& w, int in, int out, int frame, int c0, float4* to,
                              int threads) {
  for (int i = threadIdx.x; i < K * kDepth * K * kOut; i += threads) {
    const int o = i % kOut, tap = i / kOut % K, c = c0 + i / (kOut * K) % kDepth;
    const int row = i / (kOut * K * kDepth);
    const int64_t from = (((int64_t{o} * in + c) * w.frames + frame) * K + row) * K + tap;
    reinterpret_cast<float*>(to)[i] = o < out && c < in ? w.weight[from] : 0.0f;
  }
}

// sums[o] += the taps of one frame of the kernel, for the four columns at patch row `row` and quad
// `quad`; the taps begin at that row and K / 2 columns before.
template <int kOut, int K, int kRows, int kQuads>
__device__ void convolve(Patch<kRows, kQuads>& patch, int row, int quad, const float4* weights,
                         float (*sums)[kQuad]) {
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      const float* const from = patch.at(c, row + k, quad);
      const float4 four = *reinterpret_cast<const float4*>(from);
      const float x[6] = {K == 3 ? from[-1] : 0.0f,   four.x, four.y, four.z, four.w,
                          K == 3 ? from[kQuad] : 0.0f};
#pragma unroll
      for (int tap = 0; tap < K; ++tap)
#pragma unroll
        for (int o = 0; o < kOut; o += 4) {
          const float4 w = weights[(((k * kDepth + c) * K + tap) * kOut + o) / 4];
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            const float value = x[i + (K == 3 ? tap : 1)];
            sums[o][i] = fmaf(w.x, value, sums[o][i]);
            sums[o + 1][i] = fmaf(w.y, value, sums[o + 1][i]);
            sums[o + 2][i] = fmaf(w.z, value, sums[o + 2][i]);
            sums[o + 3][i] = fmaf(w.w, value, sums[o + 3][i]);
          }
        }
    }
}

template <typename T>
struct CausalConv {
  Video<const T> x, residual;  // residual.data may be null
  Video<T> y;
  Weights weights;
  Norm norm;
  int stride, front;  // of time; frames of zeros ahead
  bool post_silu;
};

// A block computes a tile of kConvRows rows and kColumns columns of a frame of y. Grid: (tiles,
// frames, batch). K is the kernel size in space, 1 or 3.
template <typename T, int kOut, int K>
__global__ void __launch_bounds__(kConvThreads) causal_conv_kernel(CausalConv<T> call) {
  __shared__ Patch<kConvRows + K - 1, kColumns / kQuad + 2> patch;
  __shared__ float4 weights[K * kDepth * K * kOut / 4];
  const Video<const T>& x = call.x;
  const Video<T>& y = call.y;
  const int tiles = (y.width + kColumns - 1) / kColumns, frame = blockIdx.y;
  const int column = blockIdx.x % tiles * kColumns, row = blockIdx.x / tiles * kConvRows;
  const int my_row = threadIdx.x / (kColumns / kQuad), my_quad = threadIdx.x % (kColumns / kQuad);
  const int64_t batch = blockIdx.z;

  float sums[kOut][kQuad] = {};
  for (int k = 0; k < call.weights.frames; ++k) {
    const int from = frame * call.stride - call.front + k;
    if (from < 0) continue;
    for (int c = 0; c < x.channels; c += kDepth) {
      __syncthreads();
      patch.stage(x, batch, from, c, row - K / 2, column - kQuad, call.norm, kConvThreads);
      stage_weights<kOut, K>(call.weights, x.channels, y.channels, k, c, weights, kConvThreads);
      __syncthreads();
      convolve<kOut, K>(patch, my_row, my_quad + 1, weights, sums);
    }
  }
  const int at = row + my_row, first = column + my_quad * kQuad;
  if (at >= y.height || first >= y.width) return;
#pragma unroll
  for (int o = 0; o < kOut; ++o) {
    if (o >= y.channels) break;
    float more[kQuad] = {}, result[kQuad];
    if (call.residual.data)
      load_quad(call.residual.row(batch, o, frame, at), first, y.width, y.aligned, more);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const float sum = sums[o][i] + (call.weights.bias ? call.weights.bias[o] : 0.0f);
      result[i] = (call.post_silu ? sum / (1.0f + expf(-sum)) : sum) + more[i];
    }
    store_quad(y.row(batch, o, frame, at), first, y.width, y.aligned, result);
  }
}

// Calls launch(kernel, grid) with the kernel to run in blocks of kConvThreads threads.
template <typename T, typename Launch>
void causal_conv(const CausalConv<T>& call, int batch, int size_in_space, Launch launch) {
  const Video<T>& y = call.y;
  const auto blocks = [](int size, int tile) {
    return static_cast<unsigned>((size + tile - 1) / tile);
  };
  const dim3 grid{blocks(y.width, kColumns) * blocks(y.height, kConvRows),
                  static_cast<unsigned>(y.frames), static_cast<unsigned>(batch)};
  const auto of_out = [&]<int kOut>() {
    size_in_space == 1 ? launch(causal_conv_kernel<T, kOut, 1>, grid)
                       : launch(causal_conv_kernel<T, kOut, 3>, grid);
  };
  if (y.channels <= 4) return of_out.template operator()<4>();
  if (y.channels <= 8) return of_out.template operator()<8>();
  of_out.template operator()<16>();
}

}  // namespace emu3
