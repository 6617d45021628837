#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// A cache [B or pages, S or page, G, K]: strides count elements, K has unit stride.
struct Cache {
  const void* data;
  int64_t row_stride, key_stride, head_stride;
};

// Where key j of a row lies: in the row itself, or at j % page of the page that the table names.
struct Pages {
  const int32_t* table;  // null: in the row itself
  int64_t row_stride, page;
};

struct DecodeCall {
  Dtype dtype;
  int64_t new_tokens, heads, groups, width;
  float scale;  // of the scores, log2(e) included: the softmax is one of powers of 2
  const void* q;
  int64_t q_row_stride, q_token_stride, q_head_stride;
  Cache k, v;
  Pages pages;

  // Rows of queries that a batch entry has: by key head, then by token, then by head of the group.
  int64_t queries() const { return new_tokens * heads; }
  int64_t padded() const { return (width + 31) / 32 * 32; }
};

// A run of the keys of one batch entry, which one thread takes.
struct Piece {
  int64_t row, length, first, end;  // of `length` keys, [first, end)
};

// What a query has after some keys, as floats: the greatest score, 2^(score - greatest) summed in
// kMostLanes lanes, and the values weighted by that, as many as DecodeCall::padded().
constexpr int64_t kMostLanes = 16;
inline int64_t partial_size(const DecodeCall& call) { return call.padded() + 2 * kMostLanes; }

struct DecodeAttention {
  // Lays the queries of a batch entry out for attend: queries() * padded() floats.
  void (*pack)(const DecodeCall& call, int64_t row, float* packed);
  // Writes the partial result of every query.
  void (*attend)(const DecodeCall& call, const Piece& piece, const float* packed, float* partial);
  // Writes the result of query `i` of a row from its partials, `stride` floats apart, to `out`.
  void (*merge)(const DecodeCall& call, const float* partial, int64_t count, int64_t stride,
                void* out);
};

EMU3_KERNELS(DecodeAttention, decode_attention)

}  // namespace emu3
