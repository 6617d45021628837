// Small kernels, correct and faulty, to test fiber.h.
#include "fiber.h"

#include <stdio.h>

#include <functional>
#include <map>

namespace {

constexpr int kThreads = 64;

// out[i] = in[63 - i], through shared memory.
template <bool kSync>
__global__ void reverse(const int* in, int* out) {
  __shared__ int tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (kSync) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Without the second barrier, a tile is overwritten while slow threads may still read it.
template <bool kSecondSync>
__global__ void sum_tiles(const int* in, int* out) {
  __shared__ int tile[kThreads];
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    tile[threadIdx.x] = in[threadIdx.x] + round;
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % kThreads];
    if (kSecondSync) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// A race: every thread writes the same address, and the last one wins.
__global__ void last_writer(const int* in, int* out) {
  __shared__ int winner;
  winner = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = winner;
}

__global__ void divergent(const int* in, int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void two_barriers(const int* in, int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

// Sum of each warp in all of its lanes, then of the block, twice over.
__global__ void reduce(const int* in, int* out) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  int sum = in[threadIdx.x];
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicAdd(&total, sum);
  __syncthreads();
  out[threadIdx.x] =
      total + __shfl_sync(0xffffffffu, sum, 0) - __shfl_down_sync(0xffffffffu, sum, 1);
}

}  // namespace

int main(int, char** argv) {
  const std::map<std::string, std::function<void(const int*, int*)>> kernels = {
      {"reverse", reverse<true>},     {"reverse_without_sync", reverse<false>},
      {"sum_tiles", sum_tiles<true>}, {"sum_tiles_without_second_sync", sum_tiles<false>},
      {"last_writer", last_writer},   {"divergent", divergent},
      {"two_barriers", two_barriers}, {"reduce", reduce},
  };
  int in[kThreads], out[kThreads];
  std::iota(in, in + kThreads, 0);
  try {
    const auto& kernel = kernels.at(argv[1]);
    fiber::launch({1}, {kThreads}, atoi(argv[2]), [&] { kernel(in, out); });
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  for (int x : out) printf("%d ", x);
}
