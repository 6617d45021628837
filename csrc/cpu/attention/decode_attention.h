#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// A cache [B or pages, S or page, KV heads, K]: strides count elements, K has unit stride.
struct Cache {
  const void* data;
  int64_t row_stride, key_stride, head_stride;
};

// Key j of batch entry b is at row b of the cache without a table, else at j % page of row
// table[b][j / page].
struct Pages {
  const int32_t* table;  // [B, max_pages] or null
  int64_t row_stride, page;
};

struct DecodeCall {
  Dtype dtype;
  int64_t new_tokens, heads, kv_heads, head_dim;
  float scale;  // of the scores, times log2(e): the softmax is computed with 2^x
  const void* q;
  int64_t q_row_stride, q_token_stride, q_head_stride;
  Cache k, v;
  Pages pages;
  const uint64_t* mask;  // [B, new_tokens] or null: bit j of word i, new token i attends to j

  // Query rows of a batch entry, in the order of KV head, token, head of the KV head.
  int64_t queries() const { return new_tokens * heads; }
  int64_t padded() const { return (head_dim + 31) / 32 * 32; }
};

// Keys [first, end) of the `length` keys of batch entry `row`: the task of one thread.
struct KeySplit {
  int64_t row, length, first, end;
};

// The partial softmax of a query over a split, as floats: the sum of p * v, DecodeCall::padded()
// floats; l_i = sum of p in kMaxLanes lanes; m_i, the maximum score. p = 2^(score - m_i).
constexpr int64_t kMaxLanes = 16;
inline int64_t partial_size(const DecodeCall& call) { return call.padded() + 2 * kMaxLanes; }

struct DecodeAttention {
  // Packs the queries of a batch entry for attend: queries() * padded() floats.
  void (*pack)(const DecodeCall& call, int64_t row, float* packed);
  // Writes the partial softmax of every query over a split.
  void (*attend)(const DecodeCall& call, const KeySplit& split, const float* packed,
                 float* partial);
  // Merges the `count` partials of a query, `stride` floats apart, into its output.
  void (*merge)(const DecodeCall& call, const float* partial, int64_t count, int64_t stride,
                void* out);
};

EMU3_KERNELS(DecodeAttention, decode_attention)

}  // namespace emu3
