// decode_attention on a GPU: few queries, many keys. A block takes a run of the keys of one key
// head for up to 8 of the queries that read it. Lanes that hold 16 bytes each read a key, so that a
// warp reads 1 to 4 keys at a time and every such team of lanes keeps a softmax of its own; teams,
// warps and at last blocks merge theirs. Tensor cores would be fed 16 rows for a few. Knows no
// torch. tests/cuda/fiber.h compiles it for the CPU.
#pragma once

#include <stdint.h>

#include "cuda/lib/element.cuh"

namespace emu3 {

constexpr int kDecodeWarps = 4, kDecodeThreads = kDecodeWarps * 32;
constexpr int kKeysOfRun = 64;  // a run is a multiple, so that only the last is ragged
constexpr int kMostSplits = 64;
constexpr int kBlocksOfMultiprocessor = 4;
constexpr uint32_t kAllLanes = 0xffffffff;

// Strides count elements, the head width has unit stride; keys and values start at 16 bytes.
template <typename T>
struct DecodeHeads {
  const T* data;
  int64_t row_stride, key_stride, head_stride;  // of q: batch entry, token, head
};

template <typename T>
struct Decode {
  DecodeHeads<T> q, k, v;
  const int32_t *lengths, *table;  // no table: keys lie in the batch entry itself
  int64_t table_stride;
  int page, new_tokens, heads_of_group, groups, splits;
  float scale;     // of the scores, log2(e) included
  float* partial;  // [batch, groups, splits, rows, width], and lse without width
  float* lse;
  T* out;  // [batch, new_tokens, groups, heads_of_group, width]

  __device__ int rows() const { return new_tokens * heads_of_group; }

  // Keys of one run: settled by the length, which the host does not know.
  __device__ int share(int length) const {
    const int each = (length + splits - 1) / splits;
    return (each + kKeysOfRun - 1) / kKeysOfRun * kKeysOfRun;
  }
};

struct alignas(16) Vector {
  uint32_t word[4];
};

__device__ inline void unpack(const Vector& from, float* to, const float*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(from.word[i]);
}

__device__ inline void unpack(const Vector& from, float* to, const bfloat16*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(from.word[i] << 16);
    to[2 * i + 1] = __uint_as_float(from.word[i] & 0xffff0000);
  }
}

constexpr float kUnseen = -__builtin_huge_valf();

// What is subtracted from scores: not infinity from itself where nothing has been seen.
__device__ inline float reference_of(float greatest) { return greatest == kUnseen ? 0 : greatest; }

// The softmax of one query so far: values weighted by 2^(score - greatest), and those weights.
template <int kPer>
struct Softmax {
  float greatest = kUnseen, denominator = 0, total[kPer] = {};

  __device__ void rescale(float higher) {
    const float factor = exp2f(greatest - reference_of(higher));
    denominator *= factor;
#pragma unroll
    for (int i = 0; i < kPer; ++i) total[i] *= factor;
    greatest = higher;
  }

  // Joins the team whose lane differs from this one in `bits`.
  __device__ void join(int bits) {
    const float others = __shfl_xor_sync(kAllLanes, greatest, bits);
    rescale(fmaxf(greatest, others));
    denominator += __shfl_xor_sync(kAllLanes, denominator, bits);
#pragma unroll
    for (int i = 0; i < kPer; ++i) total[i] += __shfl_xor_sync(kAllLanes, total[i], bits);
  }
};

// grid: splits, groups * blocks of kRows queries, batch.
template <typename T, int kWidth, int kRows>
__global__ void __launch_bounds__(kDecodeThreads) decode_attention_kernel(Decode<T> call) {
  constexpr int kPer = 16 / sizeof(T), kTeam = kWidth / kPer, kTeams = kDecodeThreads / kTeam;
  constexpr int kUnroll = kRows < 8 ? 4 : 2;  // keys of a team that are on their way at once
  __shared__ float4 totals[kDecodeWarps][kRows][kWidth / 4];
  __shared__ float greatest[kDecodeWarps][kRows], denominators[kDecodeWarps][kRows];
  const int blocks = (call.rows() + kRows - 1) / kRows;
  const int64_t batch = blockIdx.z;
  const int group = blockIdx.y / blocks, first_row = blockIdx.y % blocks * kRows;
  const int length = call.lengths[batch], share = call.share(length);
  const int start = blockIdx.x * share, stop = start + share < length ? start + share : length;
  if (start >= stop) return;
  const int team = threadIdx.x / kTeam, column = threadIdx.x % kTeam * kPer;

  float query[kRows][kPer];
  int sees[kRows];  // keys; rows past the last see none
  Softmax<kPer> softmax[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r, token = row / call.heads_of_group;
    const int head = group * call.heads_of_group + row % call.heads_of_group;
    sees[r] = row < call.rows() ? length - call.new_tokens + 1 + token : 0;
    Vector elements = {};
    if (row < call.rows())
      elements = *reinterpret_cast<const Vector*>(call.q.data + batch * call.q.row_stride +
                                                  token * call.q.key_stride +
                                                  head * call.q.head_stride + column);
    unpack(elements, query[r], call.q.data);
#pragma unroll
    for (int i = 0; i < kPer; ++i) query[r][i] *= call.scale;
  }

  const T* const keys = call.k.data + group * call.k.head_stride + column;
  const T* const values = call.v.data + group * call.v.head_stride + column;
  for (int first = start + team; first - team < stop; first += kTeams * kUnroll) {
    Vector key[kUnroll], value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int j = first + u * kTeams;
      key[u] = {}, value[u] = {};
      if (j >= stop) continue;
      int64_t at = batch, place = j;
      if (call.table) {
        at = call.table[batch * call.table_stride + j / call.page];
        place = j % call.page;
      }
      key[u] = *reinterpret_cast<const Vector*>(keys + at * call.k.row_stride +
                                                place * call.k.key_stride);
      value[u] = *reinterpret_cast<const Vector*>(values + at * call.v.row_stride +
                                                  place * call.v.key_stride);
    }
    float score[kRows][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float elements[kPer];
      unpack(key[u], elements, keys);
      const int j = first + u * kTeams;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum += query[r][i] * elements[i];
#pragma unroll
        for (int bits = kTeam / 2; bits; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
        score[r][u] = j < stop && j < sees[r] ? sum : kUnseen;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float higher = softmax[r].greatest;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) higher = fmaxf(higher, score[r][u]);
      softmax[r].rescale(higher);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        score[r][u] = exp2f(score[r][u] - reference_of(higher));
        softmax[r].denominator += score[r][u];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float elements[kPer];
      unpack(value[u], elements, values);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kPer; ++i) softmax[r].total[i] += score[r][u] * elements[i];
    }
  }

  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int bits = kTeam; bits < 32; bits *= 2) softmax[r].join(bits);
    if (threadIdx.x % 32 < kTeam) {
#pragma unroll
      for (int i = 0; i < kPer; i += 4) {
        const float* const four = softmax[r].total + i;
        totals[warp][r][(column + i) / 4] = make_float4(four[0], four[1], four[2], four[3]);
      }
    }
    if (threadIdx.x % 32 == 0) {
      greatest[warp][r] = softmax[r].greatest;
      denominators[warp][r] = softmax[r].denominator;
    }
  }
  __syncthreads();

  const int64_t run = (batch * call.groups + group) * call.splits + blockIdx.x;
  for (int i = threadIdx.x; i < kRows * kWidth / 4; i += kDecodeThreads) {
    const int r = i / (kWidth / 4), c = i % (kWidth / 4);
    if (first_row + r >= call.rows()) continue;
    float higher = kUnseen, denominator = 0;
    for (int w = 0; w < kDecodeWarps; ++w) higher = fmaxf(higher, greatest[w][r]);
    float4 sum = make_float4(0, 0, 0, 0);
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float factor = exp2f(greatest[w][r] - reference_of(higher));
      denominator += factor * denominators[w][r];
      const float4 total = totals[w][r][c];
      sum = make_float4(sum.x + factor * total.x, sum.y + factor * total.y,
                        sum.z + factor * total.z, sum.w + factor * total.w);
    }
    const float inverse = denominator == 0 ? 0 : 1 / denominator;
    const int64_t place = run * call.rows() + first_row + r;
    reinterpret_cast<float4*>(call.partial)[place * (kWidth / 4) + c] =
        make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
    if (c == 0) call.lse[place] = higher + log2f(denominator);
  }
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T element[4];
};

// A warp a query. grid: as many as it takes, groups, batch.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads) merge_decoded_kernel(Decode<T> call) {
  const int row = blockIdx.x * kDecodeWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= call.rows()) return;
  const int64_t batch = blockIdx.z, group = blockIdx.y;
  const int length = call.lengths[batch], share = call.share(length);
  const int runs = length > 0 ? (length + share - 1) / share : 0;
  const int64_t first = (batch * call.groups + group) * call.splits * call.rows() + row;
  float greatest = kUnseen;
#pragma unroll 1
  for (int s = lane; s < runs; s += 32)
    greatest = fmaxf(greatest, call.lse[first + int64_t{s} * call.rows()]);
#pragma unroll
  for (int bits = 16; bits; bits /= 2)
    greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, bits));
  if (lane >= kWidth / 4) return;
  float denominator = 0;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int s = 0; s < runs; ++s) {
    const int64_t place = first + int64_t{s} * call.rows();
    const float factor = exp2f(call.lse[place] - reference_of(greatest));
    const float4 run = reinterpret_cast<const float4*>(call.partial)[place * (kWidth / 4) + lane];
    denominator += factor;
    sum = make_float4(sum.x + factor * run.x, sum.y + factor * run.y, sum.z + factor * run.z,
                      sum.w + factor * run.w);
  }
  const float inverse = denominator == 0 ? 0 : 1 / denominator;
  const int64_t token = row / call.heads_of_group, head = row % call.heads_of_group;
  const int64_t place =
      ((batch * call.new_tokens + token) * call.groups + group) * call.heads_of_group + head;
  Four<T> rounded;
  lower(sum.x * inverse, &rounded.element[0]), lower(sum.y * inverse, &rounded.element[1]);
  lower(sum.z * inverse, &rounded.element[2]), lower(sum.w * inverse, &rounded.element[3]);
  reinterpret_cast<Four<T>*>(call.out)[place * (kWidth / 4) + lane] = rounded;
}

// Queries of a block: all that read a key, where those are not more than 8.
inline int rows_of_block(int rows) { return rows == 1 ? 1 : rows <= 4 ? 4 : 8; }

inline int blocks_of_rows(int rows) {
  return (rows + rows_of_block(rows) - 1) / rows_of_block(rows);
}

// Runs into which the keys of a row are cut, so that they fill the machine.
inline int decode_splits(int64_t batch, int groups, int rows, int64_t capacity,
                         int num_multiprocessors) {
  const int64_t blocks = batch * groups * blocks_of_rows(rows);
  const int64_t wanted = (kBlocksOfMultiprocessor * num_multiprocessors + blocks - 1) / blocks;
  const int64_t most = (capacity + kKeysOfRun - 1) / kKeysOfRun;
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int>(splits < 1 ? 1 : splits < kMostSplits ? splits : kMostSplits);
}

// Calls launch(kernel, grid) twice; blocks have kDecodeThreads threads.
template <typename T, int kWidth, typename Launch>
void decode_attention_of_width(const Decode<T>& call, int64_t batch, Launch launch) {
  const int rows = call.new_tokens * call.heads_of_group;
  const unsigned groups = call.groups, entries = static_cast<unsigned>(batch);
  const dim3 grid{static_cast<unsigned>(call.splits), groups * blocks_of_rows(rows), entries};
  switch (rows_of_block(rows)) {
    case 1:
      launch(decode_attention_kernel<T, kWidth, 1>, grid);
      break;
    case 4:
      launch(decode_attention_kernel<T, kWidth, 4>, grid);
      break;
    default:
      launch(decode_attention_kernel<T, kWidth, 8>, grid);
  }
  const unsigned blocks = (rows + kDecodeWarps - 1) / kDecodeWarps;
  launch(merge_decoded_kernel<T, kWidth>, dim3{blocks, groups, entries});
}

template <typename T, typename Launch>
void decode_attention(const Decode<T>& call, int width, int64_t batch, Launch launch) {
  if (width == 64) return decode_attention_of_width<T, 64>(call, batch, launch);
  decode_attention_of_width<T, 128>(call, batch, launch);
}

}  // namespace emu3
