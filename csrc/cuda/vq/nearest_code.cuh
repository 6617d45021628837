// nearest_code on a GPU: brute force in float32 on the CUDA cores. Tensor cores would round to TF32
// and pad D = 4 to 8 or 16. A block of 8 warps has 32 * kQueries queries. Codes are loaded to
// shared memory in tiles, 16 bytes a load; each warp scans an eighth of a tile for all queries of
// the block, and the warps are merged at the end, so that few queries still fill the GPU. Includes
// no torch header; tests/gates/fibers/fiber.h compiles this file for the CPU.
#pragma once

#include <stdint.h>

#include "cuda/lib/element.cuh"

namespace emu3 {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kTileFloats = 4096;
constexpr int kCodeGroup = 8;  // codes between two comparisons with the best distance

// z [batch, dim, positions] with strides in elements: num_queries = batch * positions queries.
template <typename T>
struct Latents {
  const T* data;
  int64_t num_queries, positions, batch_stride, dim_stride, position_stride;
  int dim;
};

constexpr float kInfinity = __builtin_huge_valf();

// Loads query t, padded with zeros, which change no distance.
template <int kDim, typename T>
__device__ void load_query(const Latents<T>& z, int64_t t, float* query) {
  const T* from = z.data + t / z.positions * z.batch_stride + t % z.positions * z.position_stride;
#pragma unroll
  for (int d = 0; d < kDim; ++d) query[d] = d < z.dim ? to_float(from[d * z.dim_stride]) : 0.0f;
}

// The distance of the reference: float32, in the order of d, every operation rounded. These
// intrinsics are never contracted to an FMA.
template <int kDim>
__device__ float distance(const float* query, const float* code) {
  float sum = 0;
#pragma unroll
  for (int d = 0; d < kDim; ++d) {
    const float x = __fsub_rn(query[d], code[d]);
    sum = d == 0 ? __fmul_rn(x, x) : __fadd_rn(sum, __fmul_rn(x, x));
  }
  return sum;
}

// Loads a tile of codes from `first` on; codes past the last are infinitely far away.
template <int kDim>
__device__ void load_tile(const float4* codebook, int num_codes, int first, float4* tile) {
  constexpr int kVectors = kDim / 4;
  const int end = (num_codes - first) * kVectors;
#pragma unroll
  for (int i = threadIdx.x; i < kTileFloats / 4; i += kThreads)
    tile[i] = i < end ? codebook[int64_t{first} * kVectors + i]
                      : make_float4(kInfinity, kInfinity, kInfinity, kInfinity);
}

// Returns the first code at the least distance of all warps, searched in the lowest group that has
// it.
template <int kDim, typename T>
__device__ int64_t merge_warps(const Latents<T>& z, int64_t t, const float4* codebook,
                               int num_codes, const float* best_of_warp, const int* group_of_warp,
                               int stride) {
  float best = kInfinity;
  int group = 0;
  for (int w = 0; w < kWarps; ++w) {
    const float warp_best = best_of_warp[w * stride];
    const int warp_group = group_of_warp[w * stride];
    if (warp_best < best || (warp_best == best && warp_group < group))
      best = warp_best, group = warp_group;
  }
  if (best == kInfinity) return 0;
  float query[kDim];
  load_query<kDim>(z, t, query);
  const float* codes = reinterpret_cast<const float*>(codebook);
  int id = group;
  while (distance<kDim>(query, codes + int64_t{id} * kDim) != best) ++id;
  return id;
}

// codebook [num_codes, kDim] aligned to 16 bytes, ids [num_queries].
template <typename T, int kDim, int kQueries>
__global__ void __launch_bounds__(kThreads)
    nearest_code_kernel(Latents<T> z, const float4* codebook, int num_codes, int64_t* ids) {
  constexpr int kTile = kTileFloats / kDim, kCodesPerWarp = kTile / kWarps, kBlock = 32 * kQueries;
  __shared__ float4 tile[kTileFloats / 4];
  __shared__ float best_of_warp[kWarps][kBlock];
  __shared__ int group_of_warp[kWarps][kBlock];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_query = int64_t{blockIdx.x} * kBlock;

  float query[kQueries][kDim], best[kQueries];
  int group[kQueries];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const int64_t t = first_query + q * 32 + lane;
    load_query<kDim>(z, t < z.num_queries ? t : z.num_queries - 1, query[q]);
    best[q] = kInfinity;
    group[q] = 0;
  }

  for (int first = 0; first < num_codes; first += kTile) {
    __syncthreads();
    load_tile<kDim>(codebook, num_codes, first, tile);
    __syncthreads();
    for (int begin = warp * kCodesPerWarp; begin < (warp + 1) * kCodesPerWarp;
         begin += kCodeGroup) {
      float group_min[kQueries];
#pragma unroll
      for (int q = 0; q < kQueries; ++q) group_min[q] = kInfinity;
#pragma unroll
      for (int n = 0; n < kCodeGroup; ++n) {
        float code[kDim];
#pragma unroll
        for (int v = 0; v < kDim / 4; ++v) {
          const float4 four = tile[(begin + n) * (kDim / 4) + v];
          code[v * 4] = four.x, code[v * 4 + 1] = four.y;
          code[v * 4 + 2] = four.z, code[v * 4 + 3] = four.w;
        }
#pragma unroll
        for (int q = 0; q < kQueries; ++q)  // fminf ignores NaN
          group_min[q] = fminf(group_min[q], distance<kDim>(query[q], code));
      }
#pragma unroll
      for (int q = 0; q < kQueries; ++q)
        if (group_min[q] < best[q]) best[q] = group_min[q], group[q] = first + begin;
    }
  }

#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    best_of_warp[warp][q * 32 + lane] = best[q];
    group_of_warp[warp][q * 32 + lane] = group[q];
  }
  __syncthreads();
  const int64_t t = first_query + threadIdx.x;
  if (threadIdx.x < kBlock && t < z.num_queries)
    ids[t] = merge_warps<kDim>(z, t, codebook, num_codes, &best_of_warp[0][threadIdx.x],
                               &group_of_warp[0][threadIdx.x], kBlock);
}

// Chooses the queries of a thread: as many as fit the registers if the blocks still fill the GPU.
template <typename T, int kDim, typename Launch>
void nearest_code_of_dim(const Latents<T>& z, int num_multiprocessors, Launch launch) {
  constexpr int kMany = 32 / kDim, kFew = kMany > 4 ? kMany / 4 : 1;
  const auto blocks = [&](int queries) {
    return static_cast<unsigned>((z.num_queries + 32 * queries - 1) / (32 * queries));
  };
  if (blocks(kMany) >= static_cast<unsigned>(num_multiprocessors) / 2) {
    launch(nearest_code_kernel<T, kDim, kMany>, blocks(kMany));
  } else {
    launch(nearest_code_kernel<T, kDim, kFew>, blocks(kFew));
  }
}

// Returns the floats of a code after padding with zeros.
inline int padded_dim(int dim) { return dim <= 4 ? 4 : dim <= 8 ? 8 : dim <= 16 ? 16 : 32; }

// Calls launch(kernel, num_blocks) with the kernel to run in blocks of kThreads threads.
template <typename T, typename Launch>
void nearest_code(const Latents<T>& z, int num_multiprocessors, Launch launch) {
  switch (padded_dim(z.dim)) {
    case 4:
      return nearest_code_of_dim<T, 4>(z, num_multiprocessors, launch);
    case 8:
      return nearest_code_of_dim<T, 8>(z, num_multiprocessors, launch);
    case 16:
      return nearest_code_of_dim<T, 16>(z, num_multiprocessors, launch);
    default:
      return nearest_code_of_dim<T, 32>(z, num_multiprocessors, launch);
  }
}

}  // namespace emu3
