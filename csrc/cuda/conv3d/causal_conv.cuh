// Causal convolutions of few channels on a GPU, in float32 on the CUDA cores: at the 4 channels of
// Emu3, three quarters of a 16-wide tensor core tile would be padding. A thread computes four
// columns of a row. The frames of the kernel are staged in shared memory together, four channels at
// a time, with norm and SiLU applied, so that the latency of memory is paid once. Blocks are small:
// the latents of one image fill a GPU. Every sum goes through the frames of the kernel from the
// earliest on, so that it depends neither on where a chunk of a video begins nor on the tile.
// Includes no torch header; tests/gates/fibers/fiber.h compiles this file for the CPU.
#pragma once

#include <stdint.h>

#include "cuda/lib/element.cuh"

namespace emu3 {

constexpr int kColumns = 32, kQuad = 4;  // of a tile, of a thread
constexpr int kDepth = 4;                // channels that are staged at a time
constexpr int kStaged = 3;               // frames likewise
constexpr int kConvThreads = 64;
// Rows of a tile. With fewer, more threads share the output channels of a column.
constexpr int kTallRows = 8, kFlatRows = 2;

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

// Parameters in float32 or bfloat16, contiguous.
struct Parameter {
  const void* data;  // or null
  bool is_bfloat16;

  __device__ float operator[](int i) const {
    return is_bfloat16 ? to_float(static_cast<const bfloat16*>(data)[i])
                       : static_cast<const float*>(data)[i];
  }
};

__device__ inline float silu(float x) {
#ifdef __CUDACC__
  return __fdividef(x, 1.0f + __expf(-x));  // errors of 2 and 2 units in the last place
#else
  return x / (1.0f + expf(-x));
#endif
}

struct Norm {
  Parameter scale, shift;  // [channels], both or none
  bool silu;
};

struct Weights {
  Parameter weight, bias;  // [out, in, frames, K, K], [out] or none
  int frames;
};

// Loads zeros if not `inside`. An aligned quad is in a row or beside it.
template <bool kAligned, typename T>
__device__ void load_quad(const T* row, int column, int width, bool inside, float* to) {
  if constexpr (kAligned) {
    Quad<T> quad{};
    if (inside) quad = *reinterpret_cast<const Quad<T>*>(row + column);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) to[i] = to_float(quad.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      to[i] = inside && column + i >= 0 && column + i < width ? to_float(row[column + i]) : 0.0f;
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

// Four channels of a part of some frames after norm and activation, with zeros outside the video,
// as [kDepth, kStaged, kRows, kQuads * 4] floats.
template <int kRows>
struct Patch {
  static constexpr int kQuads = kColumns / kQuad + 2, kOfChannel = kStaged * kRows * kQuads;
  float4 quads[kDepth * kOfChannel];

  __device__ const float* at(int channel, int frame, int row, int quad) const {
    return reinterpret_cast<const float*>(
        quads + ((channel * kStaged + frame) * kRows + row) * kQuads + quad);
  }

  // Stages frames from `first` on, rows from y0, columns from x0 (a multiple of four) and channels
  // from c0.
  template <typename T>
  __device__ void stage(const Video<const T>& x, int64_t batch, int first, int c0, int y0, int x0,
                        const Norm& norm) {
#pragma unroll 1
    for (int c = 0; c < kDepth; ++c) {
      float4* const to = quads + c * kOfChannel;
      x.aligned ? stage_channel<true>(x, batch, first, c0 + c, y0, x0, norm, to)
                : stage_channel<false>(x, batch, first, c0 + c, y0, x0, norm, to);
    }
  }

  // All loads of a thread come before its first store, so that they are in flight together.
  template <bool kAligned, typename T>
  __device__ void stage_channel(const Video<const T>& x, int64_t batch, int first, int channel,
                                int y0, int x0, const Norm& norm, float4* to) {
    constexpr int kEach = (kOfChannel + kConvThreads - 1) / kConvThreads;
    const bool exists = channel < x.channels, normed = exists && norm.scale.data;
    float values[kEach][kQuad];
    unsigned inside = 0;  // a bit for each quad
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int i = n * kConvThreads + threadIdx.x, frame = first + i / (kRows * kQuads);
      const int y = y0 + i / kQuads % kRows, column = x0 + i % kQuads * kQuad;
      const bool here = i < kOfChannel && exists && frame >= 0 && frame < x.frames && y >= 0 &&
                        y < x.height && column > (kAligned ? -1 : -kQuad) && column < x.width;
      inside |= unsigned{here} << n;
      load_quad<kAligned>(x.row(batch, channel, frame, y), column, x.width, here, values[n]);
    }
    const float scale = normed ? norm.scale[channel] : 1.0f;
    const float shift = normed ? norm.shift[channel] : 0.0f;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int i = n * kConvThreads + threadIdx.x, column = x0 + i % kQuads * kQuad;
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        float value = normed ? fmaf(scale, values[n][j], shift) : values[n][j];
        if (norm.silu) value = silu(value);
        const bool in_row = kAligned || (column + j >= 0 && column + j < x.width);
        values[n][j] = (inside >> n & 1) && in_row ? value : 0.0f;
      }
      if (i < kOfChannel)
        to[i] = make_float4(values[n][0], values[n][1], values[n][2], values[n][3]);
    }
  }
};

// Stages the weights of frames of the kernel from `first` on and of channels from c0 on, [kStaged,
// K, kDepth, K, kOut], padded with zeros.
template <int kOut, int K>
__device__ void stage_weights(const Weights& w, int in, int out, int first, int c0, float4* to) {
  for (int i = threadIdx.x; i < kStaged * K * kDepth * K * kOut; i += kConvThreads) {
    const int o = i % kOut, tap = i / kOut % K, c = c0 + i / (kOut * K) % kDepth;
    const int row = i / (kOut * K * kDepth) % K, frame = first + i / (kOut * K * kDepth * K);
    const bool exists = o < out && c < in && frame < w.frames;
    const int from = (((o * in + c) * w.frames + frame) * K + row) * K + tap;
    reinterpret_cast<float*>(to)[i] = exists ? w.weight[from] : 0.0f;
  }
}

// Loads kCount floats, a multiple of four as vectors.
template <int kCount>
__device__ void load_floats(const float* from, float* to) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

// sums[o] += the taps of a staged frame, for kMine of kOut channels and the four columns at patch
// row `row` and quad `quad`; the taps begin at that row and K / 2 columns before.
template <int kOut, int kMine, int K, int kRows>
__device__ void convolve(const Patch<kRows>& patch, int frame, int row, int quad,
                         const float* weights, float (*sums)[kQuad]) {
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      const float* const from = patch.at(c, frame, row + k, quad);
      const float4 four = *reinterpret_cast<const float4*>(from);
      const float x[6] = {K == 3 ? from[-1] : 0.0f,   four.x, four.y, four.z, four.w,
                          K == 3 ? from[kQuad] : 0.0f};
#pragma unroll
      for (int tap = 0; tap < K; ++tap) {
        float w[kMine];
        load_floats<kMine>(weights + ((k * kDepth + c) * K + tap) * kOut, w);
#pragma unroll
        for (int o = 0; o < kMine; ++o)
#pragma unroll
          for (int i = 0; i < kQuad; ++i)
            sums[o][i] = fmaf(w[o], x[i + (K == 3 ? tap : 1)], sums[o][i]);
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

// A block computes a tile of kRows rows and kColumns columns of a frame of y. Grid: (tiles, frames,
// batch). K is the kernel size in space, 1 or 3.
template <typename T, int kOut, int K, int kRows>
__global__ void __launch_bounds__(kConvThreads) causal_conv_kernel(CausalConv<T> call) {
  constexpr int kQuads = kColumns / kQuad, kMine = kOut * kRows * kQuads / kConvThreads;
  constexpr int kFrame = K * kDepth * K * kOut;
  __shared__ Patch<kRows + K - 1> patch;
  __shared__ float4 weights[kStaged * kFrame / 4];
  const Video<const T>& x = call.x;
  const Video<T>& y = call.y;
  const int tiles = (y.width + kColumns - 1) / kColumns, frame = blockIdx.y;
  const int column = blockIdx.x % tiles * kColumns, row = blockIdx.x / tiles * kRows;
  const int my_quad = threadIdx.x % kQuads, my_row = threadIdx.x / kQuads % kRows;
  const int my_out = threadIdx.x / (kQuads * kRows) * kMine;
  const int64_t batch = blockIdx.z;
  const float* const my_weights = reinterpret_cast<const float*>(weights) + my_out;

  float sums[kMine][kQuad] = {};
  const int begin = frame * call.stride - call.front;
  for (int first = 0; first < call.weights.frames; first += kStaged) {
    if (begin + first + kStaged <= 0) continue;
    for (int c = 0; c < x.channels; c += kDepth) {
      __syncthreads();
      patch.stage(x, batch, begin + first, c, row - K / 2, column - kQuad, call.norm);
      stage_weights<kOut, K>(call.weights, x.channels, y.channels, first, c, weights);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kStaged; ++k)
        if (first + k < call.weights.frames && begin + first + k >= 0)
          convolve<kOut, kMine, K>(patch, k, my_row, my_quad + 1, my_weights + k * kFrame, sums);
    }
  }
  const int at = row + my_row, left = column + my_quad * kQuad;
  if (at >= y.height || left >= y.width) return;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int o = my_out + i;
    if (o >= y.channels) break;
    float more[kQuad] = {}, result[kQuad];
    if (call.residual.data) {
      const T* const from = call.residual.row(batch, o, frame, at);
      y.aligned ? load_quad<true>(from, left, y.width, true, more)
                : load_quad<false>(from, left, y.width, true, more);
    }
    const float bias = call.weights.bias.data ? call.weights.bias[o] : 0.0f;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float sum = sums[i][j] + bias;
      result[j] = (call.post_silu ? silu(sum) : sum) + more[j];
    }
    store_quad(y.row(batch, o, frame, at), left, y.width, y.aligned, result);
  }
}

// Calls launch(kernel, grid) with the kernel to run in blocks of kConvThreads threads: with tall
// tiles if they fill the GPU.
template <typename T, typename Launch>
void causal_conv(const CausalConv<T>& call, int batch, int size_in_space, int num_multiprocessors,
                 Launch launch) {
  const Video<T>& y = call.y;
  const auto grid = [&](int rows) {
    const auto tiles = (y.width + kColumns - 1) / kColumns * ((y.height + rows - 1) / rows);
    return dim3{static_cast<unsigned>(tiles), static_cast<unsigned>(y.frames),
                static_cast<unsigned>(batch)};
  };
  const dim3 tall = grid(kTallRows);
  const bool fills = int64_t{tall.x} * tall.y * tall.z >= num_multiprocessors;
  const auto of_size = [&]<int kOut, int K>() {
    fills ? launch(causal_conv_kernel<T, kOut, K, kTallRows>, tall)
          : launch(causal_conv_kernel<T, kOut, K, kFlatRows>, grid(kFlatRows));
  };
  const auto of_out = [&]<int kOut>() {
    size_in_space == 1 ? of_size.template operator()<kOut, 1>()
                       : of_size.template operator()<kOut, 3>();
  };
  if (y.channels <= 4) return of_out.template operator()<4>();
  if (y.channels <= 8) return of_out.template operator()<8>();
  of_out.template operator()<16>();
}

}  // namespace emu3
