// The temporal residual block of Emu3 in one kernel, for up to four channels: y = x +
// second(first(x)), two 3x3x3 convolutions, each after a norm and SiLU. A block iterates over the
// frames of a tile. It stages each frame of x once and adds it to the three hidden frames that
// depend on it; a hidden frame is complete after its own frame of x and is added to three frames of
// y. These sums are in registers. Neighbouring tiles recompute the rows and columns around a tile.
// Includes no torch header.
#pragma once

#include "cuda/conv3d/causal_conv.cuh"

namespace emu3 {

constexpr int kBlockRows = 16;
constexpr int kHiddenRows = kBlockRows + 2, kHiddenQuads = kColumns / kQuad + 2;
constexpr int kBlockThreads = (kHiddenRows * kHiddenQuads + 31) / 32 * 32;
constexpr int kTaps = 3;

template <typename T>
struct TemporalResidual {
  Video<const T> x;
  Video<T> y;
  Weights first, second;
  Norm first_norm, second_norm;
  int frames_of_block;
};

// sums[k] belong to the frame k frames later.
using FrameSums = float[kTaps][kDepth][kQuad];

template <int kRows, int kQuads>
__device__ void add_frame(Patch<kRows, kQuads>& patch, int row, int quad, const float4* weights,
                          FrameSums& sums) {
  constexpr int kFrame = kTaps * kDepth * kTaps * kDepth / 4;
#pragma unroll
  for (int k = 0; k < kTaps; ++k)
    convolve<kDepth, kTaps>(patch, row, quad, weights + (kTaps - 1 - k) * kFrame, sums[k]);
}

__device__ inline void next_frame(FrameSums& sums) {
#pragma unroll
  for (int o = 0; o < kDepth; ++o)
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      sums[0][o][i] = sums[1][o][i], sums[1][o][i] = sums[2][o][i];
      sums[2][o][i] = 0;
    }
}

// Grid: (tiles, blocks of frames, batch).
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    temporal_residual_kernel(TemporalResidual<T> call) {
  __shared__ Patch<kHiddenRows + 2, kHiddenQuads + 2> of_x;
  __shared__ Patch<kHiddenRows, kHiddenQuads> of_hidden;
  constexpr int kFrame = kTaps * kDepth * kTaps * kDepth / 4;
  __shared__ float4 first[kTaps * kFrame], second[kTaps * kFrame];
  const Video<const T>& x = call.x;
  const int channels = x.channels, tiles = (x.width + kColumns - 1) / kColumns;
  const int column = blockIdx.x % tiles * kColumns, row = blockIdx.x / tiles * kBlockRows;
  const int64_t batch = blockIdx.z;
  // The hidden quad of this thread; threads inside the tile have the y quad at the same position.
  const int my_row = threadIdx.x / kHiddenQuads, my_quad = threadIdx.x % kHiddenQuads;
  const int at = row - 1 + my_row, my_column = column + (my_quad - 1) * kQuad;
  const bool has_hidden = my_row < kHiddenRows;
  const bool in_frame = at >= 0 && at < x.height && my_column < x.width;
  const bool has_y =
      my_row > 0 && my_row <= kBlockRows && my_quad > 0 && my_quad <= kColumns / kQuad && in_frame;
  for (int k = 0; k < kTaps; ++k) {
    stage_weights<kDepth, kTaps>(call.first, channels, channels, k, 0, first + k * kFrame,
                                 kBlockThreads);
    stage_weights<kDepth, kTaps>(call.second, channels, channels, k, 0, second + k * kFrame,
                                 kBlockThreads);
  }

  FrameSums hidden = {}, sums = {};
  const int begin = blockIdx.y * call.frames_of_block;
  const int end = begin + call.frames_of_block < x.frames ? begin + call.frames_of_block : x.frames;
  for (int frame = begin < 4 ? 0 : begin - 4; frame < end; ++frame) {
    const bool whole = frame >= begin - 2;  // hidden frame; the first ones lack frames of x
    of_x.stage(x, batch, frame, 0, row - 2, column - 2 * kQuad, call.first_norm, kBlockThreads);
    __syncthreads();
    if (has_hidden) {
      add_frame(of_x, my_row, my_quad + 1, first, hidden);
#pragma unroll
      for (int o = 0; o < kDepth; ++o)
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          T rounded{};
          if (o < channels) from_float(hidden[0][o][i] + call.first.bias[o], &rounded);
          const bool inside = in_frame && my_column + i >= 0 && my_column + i < x.width;
          of_hidden.at(o, my_row, my_quad)[i] =
              o < channels && inside ? call.second_norm(to_float(rounded), o) : 0.0f;
        }
      next_frame(hidden);
    }
    __syncthreads();
    if (!has_y || !whole) continue;
    add_frame(of_hidden, my_row - 1, my_quad, second, sums);
    if (frame >= begin)
#pragma unroll
      for (int o = 0; o < kDepth; ++o) {
        if (o >= channels) break;
        float result[kQuad];
        load_quad(x.row(batch, o, frame, at), my_column, x.width, x.aligned, result);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) result[i] += sums[0][o][i] + call.second.bias[o];
        store_quad(call.y.row(batch, o, frame, at), my_column, x.width, x.aligned, result);
      }
    next_frame(sums);
  }
}

// Returns the frames of a block: all, unless more blocks are needed to fill the GPU. A block
// recomputes four frames of x and two hidden ones, so it has at least eight.
inline int frames_of_block(int64_t tiles, int frames, int num_multiprocessors) {
  const int64_t wanted = (2 * num_multiprocessors + tiles - 1) / tiles;
  const int64_t most = frames < 8 ? 1 : frames / 8, blocks = wanted < most ? wanted : most;
  return blocks < 1 ? frames : static_cast<int>((frames + blocks - 1) / blocks);
}

// Calls launch(kernel, grid, call) with the kernel to run in blocks of kBlockThreads threads.
template <typename T, typename Launch>
void temporal_residual(TemporalResidual<T> call, int batch, int num_multiprocessors,
                       Launch launch) {
  const Video<const T>& x = call.x;
  const int tiles =
      (x.width + kColumns - 1) / kColumns * ((x.height + kBlockRows - 1) / kBlockRows);
  call.frames_of_block = frames_of_block(int64_t{tiles} * batch, x.frames, num_multiprocessors);
  const int blocks = (x.frames + call.frames_of_block - 1) / call.frames_of_block;
  launch(temporal_residual_kernel<T>,
         dim3{static_cast<unsigned>(tiles), static_cast<unsigned>(blocks),
              static_cast<unsigned>(batch)},
         call);
}

}  // namespace emu3
