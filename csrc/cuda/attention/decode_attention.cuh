// decode_attention on a GPU, for few queries and many keys (split-KV). A block processes one split
// of the keys of a KV head for up to 8 of its queries. A sub-warp group of lanes loads a key, 16
// bytes a lane, so that a warp loads 1 to 4 keys at a time, and has its own online softmax.
// Sub-warp groups, then warps, then splits (in a second kernel) are merged. Tensor cores would pad
// the few rows to 16. Includes no torch header; tests/gates/fibers/fiber.h compiles this file for
// the CPU.
#pragma once

#include <stdint.h>

#include "cuda/lib/element.cuh"

namespace emu3 {

constexpr int kDecodeWarps = 4, kDecodeThreads = kDecodeWarps * 32;
constexpr int kSplitUnit = 64;  // keys per split is a multiple of this, but for the last split
constexpr int kMaxSplits = 64;
constexpr int kBlocksPerSM = 4;
constexpr uint32_t kFullMask = 0xffffffff;

// Strides count elements; head_dim has unit stride; every head is aligned to 16 bytes.
template <typename T>
struct DecodeHeads {
  const T* data;
  int64_t row_stride, key_stride, head_stride;  // of q: batch entry, token, head
};

template <typename T>
struct Decode {
  DecodeHeads<T> q, k, v;
  const int32_t *lengths, *table;  // table [batch, max_pages] or null
  const uint64_t* mask;  // [batch, new_tokens] or null: bit j of word i, new token i attends to j
  int64_t table_stride;
  int page, new_tokens, heads_per_kv, kv_heads, splits;
  float scale;     // of the scores, times log2(e)
  float* partial;  // [batch, kv_heads, splits, rows, head_dim]; lse without head_dim
  float* lse;
  T* out;  // [batch, new_tokens, kv_heads, heads_per_kv, head_dim]

  __device__ int rows() const { return new_tokens * heads_per_kv; }

  // Computed on the device: the host does not know the length.
  __device__ int keys_per_split(int length) const {
    const int each = (length + splits - 1) / splits;
    return (each + kSplitUnit - 1) / kSplitUnit * kSplitUnit;
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

constexpr float kNegInf = -__builtin_huge_valf();

// Returns m_i, or 0 before the first attended key, so that score - m_i is never inf - inf.
__device__ inline float finite_max(float m_i) { return m_i == kNegInf ? 0 : m_i; }

// The online softmax of one query: p = 2^(score - m_i), l_i = sum of p, acc = sum of p * v.
template <int kPer>
struct Softmax {
  float m_i = kNegInf, l_i = 0, acc[kPer] = {};

  __device__ void rescale(float m_new) {
    const float alpha = exp2f(m_i - finite_max(m_new));
    l_i *= alpha;
#pragma unroll
    for (int i = 0; i < kPer; ++i) acc[i] *= alpha;
    m_i = m_new;
  }

  // Merges with the sub-warp group whose lanes differ from these in `bits`.
  __device__ void merge(int bits) {
    const float other_m = __shfl_xor_sync(kFullMask, m_i, bits);
    rescale(fmaxf(m_i, other_m));
    l_i += __shfl_xor_sync(kFullMask, l_i, bits);
#pragma unroll
    for (int i = 0; i < kPer; ++i) acc[i] += __shfl_xor_sync(kFullMask, acc[i], bits);
  }
};

// Grid: (splits, kv_heads * blocks of kRows queries, batch).
template <typename T, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kDecodeThreads) decode_attention_kernel(Decode<T> call) {
  constexpr int kPer = 16 / sizeof(T), kSubWarp = kHeadDim / kPer,
                kSubWarps = kDecodeThreads / kSubWarp;
  constexpr int kUnroll = kRows < 8 ? 4 : 2;  // keys of a sub-warp group in flight
  __shared__ float4 acc_of_warp[kDecodeWarps][kRows][kHeadDim / 4];
  __shared__ float m_of_warp[kDecodeWarps][kRows], l_of_warp[kDecodeWarps][kRows];
  const int blocks = (call.rows() + kRows - 1) / kRows;
  const int64_t batch = blockIdx.z;
  const int kv_head = blockIdx.y / blocks, first_row = blockIdx.y % blocks * kRows;
  const int length = call.lengths[batch], keys_per_split = call.keys_per_split(length);
  const int begin = blockIdx.x * keys_per_split,
            end = begin + keys_per_split < length ? begin + keys_per_split : length;
  if (begin >= end) return;
  const int sub_warp = threadIdx.x / kSubWarp, column = threadIdx.x % kSubWarp * kPer;

  float query[kRows][kPer];
  int num_attended[kRows];  // keys; 0 for rows past the last
  Softmax<kPer> softmax[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r, token = row / call.heads_per_kv;
    const int head = kv_head * call.heads_per_kv + row % call.heads_per_kv;
    const int causal = length - call.new_tokens + 1 + token;
    num_attended[r] = row < call.rows() ? (call.mask ? length : causal) : 0;
    Vector elements = {};
    if (row < call.rows())
      elements = *reinterpret_cast<const Vector*>(call.q.data + batch * call.q.row_stride +
                                                  token * call.q.key_stride +
                                                  head * call.q.head_stride + column);
    unpack(elements, query[r], call.q.data);
#pragma unroll
    for (int i = 0; i < kPer; ++i) query[r][i] *= call.scale;
  }

  const T* const keys = call.k.data + kv_head * call.k.head_stride + column;
  const T* const values = call.v.data + kv_head * call.v.head_stride + column;
  for (int first = begin + sub_warp; first - sub_warp < end; first += kSubWarps * kUnroll) {
    Vector key[kUnroll], value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int j = first + u * kSubWarps;
      key[u] = {}, value[u] = {};
      if (j >= end) continue;
      int64_t at = batch, index = j;
      if (call.table) {
        at = call.table[batch * call.table_stride + j / call.page];
        index = j % call.page;
      }
      key[u] = *reinterpret_cast<const Vector*>(keys + at * call.k.row_stride +
                                                index * call.k.key_stride);
      value[u] = *reinterpret_cast<const Vector*>(values + at * call.v.row_stride +
                                                  index * call.v.key_stride);
    }
    float p[kRows][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float elements[kPer];
      unpack(key[u], elements, keys);
      const int j = first + u * kSubWarps;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum += query[r][i] * elements[i];
#pragma unroll
        for (int bits = kSubWarp / 2; bits; bits /= 2) sum += __shfl_xor_sync(kFullMask, sum, bits);
        p[r][u] = j < end && j < num_attended[r] ? sum : kNegInf;
      }
    }
    const int first_new = length - call.new_tokens;
    if (call.mask && first - sub_warp + kSubWarps * kUnroll > first_new) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = first_row + r;
        if (row >= call.rows()) break;
        const uint64_t word = call.mask[batch * call.new_tokens + row / call.heads_per_kv];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int j = first + u * kSubWarps;
          if (first_new <= j && j < end && !(word >> (j - first_new) & 1)) p[r][u] = kNegInf;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float m_new = softmax[r].m_i;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) m_new = fmaxf(m_new, p[r][u]);
      softmax[r].rescale(m_new);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        p[r][u] = exp2f(p[r][u] - finite_max(m_new));
        softmax[r].l_i += p[r][u];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float elements[kPer];
      unpack(value[u], elements, values);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kPer; ++i) softmax[r].acc[i] += p[r][u] * elements[i];
    }
  }

  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int bits = kSubWarp; bits < 32; bits *= 2) softmax[r].merge(bits);
    if (threadIdx.x % 32 < kSubWarp) {
#pragma unroll
      for (int i = 0; i < kPer; i += 4) {
        const float* const four = softmax[r].acc + i;
        acc_of_warp[warp][r][(column + i) / 4] = make_float4(four[0], four[1], four[2], four[3]);
      }
    }
    if (threadIdx.x % 32 == 0) {
      m_of_warp[warp][r] = softmax[r].m_i;
      l_of_warp[warp][r] = softmax[r].l_i;
    }
  }
  __syncthreads();

  const int64_t split = (batch * call.kv_heads + kv_head) * call.splits + blockIdx.x;
  for (int i = threadIdx.x; i < kRows * kHeadDim / 4; i += kDecodeThreads) {
    const int r = i / (kHeadDim / 4), c = i % (kHeadDim / 4);
    if (first_row + r >= call.rows()) continue;
    float m_new = kNegInf, l_i = 0;
    for (int w = 0; w < kDecodeWarps; ++w) m_new = fmaxf(m_new, m_of_warp[w][r]);
    float4 sum = make_float4(0, 0, 0, 0);
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float alpha = exp2f(m_of_warp[w][r] - finite_max(m_new));
      l_i += alpha * l_of_warp[w][r];
      const float4 acc = acc_of_warp[w][r][c];
      sum = make_float4(sum.x + alpha * acc.x, sum.y + alpha * acc.y, sum.z + alpha * acc.z,
                        sum.w + alpha * acc.w);
    }
    const float inverse = l_i == 0 ? 0 : 1 / l_i;
    const int64_t index = split * call.rows() + first_row + r;
    reinterpret_cast<float4*>(call.partial)[index * (kHeadDim / 4) + c] =
        make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
    if (c == 0) call.lse[index] = m_new + log2f(l_i);
  }
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T element[4];
};

// Merges the splits of a query, one warp per query. Grid: (blocks of queries, kv_heads, batch).
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kDecodeThreads) merge_decoded_kernel(Decode<T> call) {
  const int row = blockIdx.x * kDecodeWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= call.rows()) return;
  const int64_t batch = blockIdx.z, kv_head = blockIdx.y;
  const int length = call.lengths[batch], keys_per_split = call.keys_per_split(length);
  const int num_splits = length > 0 ? (length + keys_per_split - 1) / keys_per_split : 0;
  const int64_t first = (batch * call.kv_heads + kv_head) * call.splits * call.rows() + row;
  float m_i = kNegInf;
#pragma unroll 1
  for (int s = lane; s < num_splits; s += 32)
    m_i = fmaxf(m_i, call.lse[first + int64_t{s} * call.rows()]);
#pragma unroll
  for (int bits = 16; bits; bits /= 2) m_i = fmaxf(m_i, __shfl_xor_sync(kFullMask, m_i, bits));
  if (lane >= kHeadDim / 4) return;
  float l_i = 0;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int s = 0; s < num_splits; ++s) {
    const int64_t index = first + int64_t{s} * call.rows();
    const float alpha = exp2f(call.lse[index] - finite_max(m_i));
    const float4 part =
        reinterpret_cast<const float4*>(call.partial)[index * (kHeadDim / 4) + lane];
    l_i += alpha;
    sum = make_float4(sum.x + alpha * part.x, sum.y + alpha * part.y, sum.z + alpha * part.z,
                      sum.w + alpha * part.w);
  }
  const float inverse = l_i == 0 ? 0 : 1 / l_i;
  const int64_t token = row / call.heads_per_kv, head = row % call.heads_per_kv;
  const int64_t index =
      ((batch * call.new_tokens + token) * call.kv_heads + kv_head) * call.heads_per_kv + head;
  Four<T> rounded;
  from_float(sum.x * inverse, &rounded.element[0]),
      from_float(sum.y * inverse, &rounded.element[1]);
  from_float(sum.z * inverse, &rounded.element[2]),
      from_float(sum.w * inverse, &rounded.element[3]);
  reinterpret_cast<Four<T>*>(call.out)[index * (kHeadDim / 4) + lane] = rounded;
}

// Returns the queries of a block: all of a KV head, but at most 8.
inline int rows_of_block(int rows) { return rows == 1 ? 1 : rows <= 4 ? 4 : 8; }

inline int blocks_of_rows(int rows) {
  return (rows + rows_of_block(rows) - 1) / rows_of_block(rows);
}

// Returns the number of splits that fills the GPU.
inline int decode_splits(int64_t batch, int kv_heads, int rows, int64_t capacity,
                         int num_multiprocessors) {
  const int64_t blocks = batch * kv_heads * blocks_of_rows(rows);
  const int64_t wanted = (kBlocksPerSM * num_multiprocessors + blocks - 1) / blocks;
  const int64_t max_splits = (capacity + kSplitUnit - 1) / kSplitUnit;
  const int64_t splits = wanted < max_splits ? wanted : max_splits;
  return static_cast<int>(splits < 1 ? 1 : splits < kMaxSplits ? splits : kMaxSplits);
}

// Calls launch(kernel, grid) twice; blocks have kDecodeThreads threads.
template <typename T, int kHeadDim, typename Launch>
void decode_attention_of_dim(const Decode<T>& call, int64_t batch, Launch launch) {
  const int rows = call.new_tokens * call.heads_per_kv;
  const unsigned kv_heads = call.kv_heads, batches = static_cast<unsigned>(batch);
  const dim3 grid{static_cast<unsigned>(call.splits), kv_heads * blocks_of_rows(rows), batches};
  switch (rows_of_block(rows)) {
    case 1:
      launch(decode_attention_kernel<T, kHeadDim, 1>, grid);
      break;
    case 4:
      launch(decode_attention_kernel<T, kHeadDim, 4>, grid);
      break;
    default:
      launch(decode_attention_kernel<T, kHeadDim, 8>, grid);
  }
  const unsigned blocks = (rows + kDecodeWarps - 1) / kDecodeWarps;
  launch(merge_decoded_kernel<T, kHeadDim>, dim3{blocks, kv_heads, batches});
}

template <typename T, typename Launch>
void decode_attention(const Decode<T>& call, int head_dim, int64_t batch, Launch launch) {
  if (head_dim == 64) return decode_attention_of_dim<T, 64>(call, batch, launch);
  decode_attention_of_dim<T, 128>(call, batch, launch);
}

}  // namespace emu3
