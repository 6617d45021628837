// nearest_code on a GPU: every query against every code, float32 on the plain cores. Tensor cores
// would round the products to TF32 and pad D = 4 to 8 or 16. A block of 8 warps holds 32 * kQueries
// queries. Codes stream through shared memory, 16 bytes a load; each warp takes an eighth of a tile
// for all queries of the block, and the warps' answers are compared at the end, so that few queries
// still fill the machine. Knows no torch. tests/cuda/fiber.h compiles it for the CPU.
#pragma once

#include <stdint.h>

#include "cuda/lib/element.cuh"

namespace emu3 {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kTileFloats = 4096;
constexpr int kGroup = 8;  // codes between two looks at the best distance

// z [batch, dim, places] with strides in elements, read as num_queries = batch * places queries.
template <typename T>
struct Latents {
  const T* data;
  int64_t num_queries, places, batch_stride, dim_stride, place_stride;
  int dim;
};

constexpr float kNothing = __builtin_huge_valf();

// Query t, with zeros beyond its dim: they leave every distance as it is.
template <int kDim, typename T>
__device__ void load_query(const Latents<T>& z, int64_t t, float* query) {
  const T* from = z.data + t / z.places * z.batch_stride + t % z.places * z.place_stride;
#pragma unroll
  for (int d = 0; d < kDim; ++d) query[d] = d < z.dim ? raise(from[d * z.dim_stride]) : 0.0f;
}

// The definition: float32, in the order of d, every operation rounded. The intrinsics are never
// fused.
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

// num_codes * kDim floats from `first` on; codes past the last are infinitely far away.
template <int kDim>
__device__ void load_tile(const float4* codebook, int num_codes, int first, float4* tile) {
  constexpr int kVectors = kDim / 4;
  const int end = (num_codes - first) * kVectors;
#pragma unroll
  for (int i = threadIdx.x; i < kTileFloats / 4; i += kThreads)
    tile[i] = i < end ? codebook[int64_t{first} * kVectors + i]
                      : make_float4(kNothing, kNothing, kNothing, kNothing);
}

// The least distance of the warps, in the lowest group that has it, and there the first code at it.
template <int kDim, typename T>
__device__ int64_t settle(const Latents<T>& z, int64_t t, const float4* codebook, int num_codes,
                          const float* best_of_warp, const int* group_of_warp, int stride) {
  float best = kNothing;
  int group = 0;
  for (int w = 0; w < kWarps; ++w) {
    const float other = best_of_warp[w * stride];
    const int others = group_of_warp[w * stride];
    if (other < best || (other == best && others < group)) best = other, group = others;
  }
  if (best == kNothing) return 0;
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
  constexpr int kTile = kTileFloats / kDim, kShare = kTile / kWarps, kBlock = 32 * kQueries;
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
    best[q] = kNothing;
    group[q] = 0;
  }

  for (int first = 0; first < num_codes; first += kTile) {
    __syncthreads();
    load_tile<kDim>(codebook, num_codes, first, tile);
    __syncthreads();
    for (int start = warp * kShare; start < (warp + 1) * kShare; start += kGroup) {
      float low[kQueries];
#pragma unroll
      for (int q = 0; q < kQueries; ++q) low[q] = kNothing;
#pragma unroll
      for (int n = 0; n < kGroup; ++n) {
        float code[kDim];
#pragma unroll
        for (int v = 0; v < kDim / 4; ++v) {
          const float4 four = tile[(start + n) * (kDim / 4) + v];
          code[v * 4] = four.x, code[v * 4 + 1] = four.y;
          code[v * 4 + 2] = four.z, code[v * 4 + 3] = four.w;
        }
#pragma unroll
        for (int q = 0; q < kQueries; ++q)  // fminf passes over NaN
          low[q] = fminf(low[q], distance<kDim>(query[q], code));
      }
#pragma unroll
      for (int q = 0; q < kQueries; ++q)
        if (low[q] < best[q]) best[q] = low[q], group[q] = first + start;
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
    ids[t] = settle<kDim>(z, t, codebook, num_codes, &best_of_warp[0][threadIdx.x],
                          &group_of_warp[0][threadIdx.x], kBlock);
}

// Queries a thread: as many as registers hold where that still fills the machine.
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

// Floats between two codes: the codebook must be padded to this with zeros.
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
