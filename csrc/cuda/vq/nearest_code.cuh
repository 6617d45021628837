// nearest_code on a GPU, exact, on the CUDA cores: tensor cores would round to TF32 and pad D = 4
// to 8 or 16. A filter scores each code by half its squared norm minus its dot product with the
// query, D fused operations in place of 3 D - 1 rounded ones, and keeps the best and the second
// best group of codes. If they are further apart than rounding can account for (tolerance), the
// nearest code is in the best group, which is searched exactly; else, for a query in a hundred, all
// codes are.
//
// A block of 8 warps has 32 * kQueries queries. Codes are loaded to shared memory in tiles, 16
// bytes a load; each warp scans an eighth of a tile for all queries of the block, and the warps are
// merged at the end, so that few queries still fill the GPU. Includes no torch header;
// tests/gates/fibers/fiber.h compiles this file for the CPU.
#pragma once

#include <stdint.h>

#include "cuda/lib/element.cuh"

namespace emu3 {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kTileFloats = 4096;
constexpr int kCodeGroup = 16;  // codes between two comparisons with the best score

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

template <int kDim>
__device__ float squared_norm(const float* x) {
  float sum = 0;
#pragma unroll
  for (int d = 0; d < kDim; ++d) sum = fmaf(x[d], x[d], sum);
  return sum;
}

// Loads a tile of codes from `first` on, with half their squared norms; codes past the last are
// zeros whose norm is infinite. Returns the greatest squared norm of a code of this thread.
template <int kDim>
__device__ float load_tile(const float4* codebook, int num_codes, int first, float4* tile,
                           float* halves) {
  constexpr int kVectors = kDim / 4, kTile = kTileFloats / kDim;
  const int end = (num_codes - first) * kVectors;
#pragma unroll
  for (int i = threadIdx.x; i < kTileFloats / 4; i += kThreads)
    tile[i] = i < end ? codebook[int64_t{first} * kVectors + i] : make_float4(0, 0, 0, 0);
  __syncthreads();
  float greatest = 0;
  for (int n = threadIdx.x; n < kTile; n += kThreads) {
    const float norm = squared_norm<kDim>(reinterpret_cast<const float*>(tile) + n * kDim);
    const bool exists = first + n < num_codes;
    halves[n] = exists ? 0.5f * norm : kInfinity;
    if (exists) greatest = fmaxf(greatest, norm);
  }
  return greatest;
}

// Two scores that are further apart are in the order of the exact distances. With u = 2^-24, C the
// greatest and z the query's squared norm, and D the squared distance of the best score:
// a score is off by at most (2 D + 2) u (C / 2 + sqrt(z C)), for two scores twice; the distances of
// the reference by (D + 3) u times themselves, twice, of which a score has half. Rounding of this
// function itself is within a tenth. An overflow makes it infinite or NaN: no gap is wider.
template <int kDim>
__device__ float tolerance(float z, float greatest, float best) {
  constexpr float u = 1.0f / (1 << 24);
  const float of_score = (2 * kDim + 2) * u * (0.5f * greatest + sqrtf(z) * sqrtf(greatest));
  const float distance = fmaxf(2.0f * best + z, 0.0f) + 2.0f * of_score + 4.0f * kDim * u * z;
  return 1.1f * (2.0f * of_score + (kDim + 3) * u * distance) + 1e-40f;
}

struct Nearest {
  float distance;
  int id;

  // Of equal distances the lowest id wins; a NaN is never nearer.
  __device__ void take(float other, int other_id) {
    if (other < distance || (other == distance && other_id < id)) distance = other, id = other_id;
  }
};

// Searches codes begin, begin + step, ... before end.
template <int kDim>
__device__ Nearest search(const float* query, const float4* codebook, int begin, int end,
                          int step) {
  Nearest nearest{kInfinity, 0};
  const float* const codes = reinterpret_cast<const float*>(codebook);
  for (int n = begin; n < end; n += step) {
    const float here = distance<kDim>(query, codes + int64_t{n} * kDim);
    if (here < nearest.distance) nearest = {here, n};
  }
  return nearest;
}

// Returns the nearest of all codes, in thread 0; called by all threads of a block.
template <int kDim>
__device__ Nearest search_in_block(const float* query, const float4* codebook, int num_codes) {
  __shared__ float distances[kWarps];
  __shared__ int ids[kWarps];
  Nearest nearest = search<kDim>(query, codebook, threadIdx.x, num_codes, kThreads);
#pragma unroll
  for (int by = 16; by > 0; by /= 2) {
    const float other = __shfl_down_sync(0xffffffff, nearest.distance, by);
    nearest.take(other, __shfl_down_sync(0xffffffff, nearest.id, by));
  }
  __syncthreads();  // thread 0 has read the last result
  if (threadIdx.x % 32 == 0)
    distances[threadIdx.x / 32] = nearest.distance, ids[threadIdx.x / 32] = nearest.id;
  __syncthreads();
  for (int w = 1; threadIdx.x == 0 && w < kWarps; ++w) nearest.take(distances[w], ids[w]);
  return nearest;
}

// What a warp has found for the queries of a block.
template <int kBlock>
struct Scores {
  float best[kWarps][kBlock], second[kWarps][kBlock];
  int group[kWarps][kBlock];

  // Merges the warps; returns the group of the best score, or -1 if the second is within tolerance.
  template <int kDim>
  __device__ int merge(int at, float z, float greatest) const {
    float first = kInfinity, next = kInfinity;
    int of_first = 0;
    for (int w = 0; w < kWarps; ++w) {
      next = fminf(next, fminf(second[w][at], fmaxf(first, best[w][at])));
      if (best[w][at] < first) first = best[w][at], of_first = group[w][at];
    }
    return next > first + tolerance<kDim>(z, greatest, first) ? of_first : -1;
  }
};

// What a thread has found for its queries.
template <int kDim, int kQueries>
struct Scan {
  float query[kQueries][kDim], best[kQueries], second[kQueries];
  int group[kQueries];

  // Scores a group of codes, the first of which is `id`.
  __device__ void take(const float4* codes, const float* halves, int id) {
    float least[kQueries];
#pragma unroll
    for (int q = 0; q < kQueries; ++q) least[q] = kInfinity;
#pragma unroll
    for (int n = 0; n < kCodeGroup; ++n) {
      float code[kDim];
#pragma unroll
      for (int v = 0; v < kDim / 4; ++v) {
        const float4 four = codes[n * (kDim / 4) + v];
        code[v * 4] = four.x, code[v * 4 + 1] = four.y;
        code[v * 4 + 2] = four.z, code[v * 4 + 3] = four.w;
      }
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        float score = halves[n];
#pragma unroll
        for (int d = 0; d < kDim; ++d) score = fmaf(-query[q][d], code[d], score);
        least[q] = fminf(least[q], score);  // ignores NaN
      }
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      second[q] = fminf(second[q], fmaxf(best[q], least[q]));
      if (least[q] < best[q]) best[q] = least[q], group[q] = id;
    }
  }
};

// Writes the ids of the queries of a block; `greatest` is this thread's greatest squared norm.
template <int kDim, int kBlock, typename T>
__device__ void decide(const Latents<T>& z, const float4* codebook, int num_codes, float greatest,
                       const Scores<kBlock>& scores, int64_t* ids) {
  __shared__ float greatest_of_warp[kWarps];
  __shared__ int unclear[kBlock], num_unclear;
#pragma unroll
  for (int by = 16; by > 0; by /= 2)
    greatest = fmaxf(greatest, __shfl_down_sync(0xffffffff, greatest, by));
  if (threadIdx.x % 32 == 0) greatest_of_warp[threadIdx.x / 32] = greatest;
  if (threadIdx.x == 0) num_unclear = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kBlock, t = first + threadIdx.x;
  float query[kDim];
  if (threadIdx.x < kBlock && t < z.num_queries) {
    load_query<kDim>(z, t, query);
    for (int w = 0; w < kWarps; ++w) greatest = fmaxf(greatest, greatest_of_warp[w]);
    const int group = scores.template merge<kDim>(threadIdx.x, squared_norm<kDim>(query), greatest);
    const int end = group + kCodeGroup < num_codes ? group + kCodeGroup : num_codes;
    Nearest nearest{kInfinity, 0};
    if (group >= 0) nearest = search<kDim>(query, codebook, group, end, 1);
    if (nearest.distance < kInfinity)
      ids[t] = nearest.id;
    else
      unclear[atomicAdd(&num_unclear, 1)] = threadIdx.x;
  }
  __syncthreads();
  for (int i = 0; i < num_unclear; ++i) {
    const int64_t at = first + unclear[i];
    load_query<kDim>(z, at, query);
    const Nearest nearest = search_in_block<kDim>(query, codebook, num_codes);
    if (threadIdx.x == 0) ids[at] = nearest.id;
  }
}

// codebook [num_codes, kDim] aligned to 16 bytes, ids [num_queries].
template <typename T, int kDim, int kQueries>
__global__ void __launch_bounds__(kThreads)
    nearest_code_kernel(Latents<T> z, const float4* codebook, int num_codes, int64_t* ids) {
  constexpr int kTile = kTileFloats / kDim, kOfWarp = kTile / kWarps, kBlock = 32 * kQueries;
  __shared__ float4 tile[kTileFloats / 4];
  __shared__ float halves[kTile];
  __shared__ Scores<kBlock> scores;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  Scan<kDim, kQueries> scan;
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const int64_t t = int64_t{blockIdx.x} * kBlock + q * 32 + lane;
    load_query<kDim>(z, t < z.num_queries ? t : z.num_queries - 1, scan.query[q]);
    scan.best[q] = scan.second[q] = kInfinity;
    scan.group[q] = 0;
  }
  float greatest = 0;
  for (int first = 0; first < num_codes; first += kTile) {
    __syncthreads();
    greatest = fmaxf(greatest, load_tile<kDim>(codebook, num_codes, first, tile, halves));
    __syncthreads();
    for (int begin = warp * kOfWarp; begin < (warp + 1) * kOfWarp; begin += kCodeGroup)
      scan.take(tile + begin * (kDim / 4), halves + begin, first + begin);
  }
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    scores.best[warp][q * 32 + lane] = scan.best[q];
    scores.second[warp][q * 32 + lane] = scan.second[q];
    scores.group[warp][q * 32 + lane] = scan.group[q];
  }
  decide<kDim>(z, codebook, num_codes, greatest, scores, ids);
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
