#pragma once

#include <stdint.h>

#include "cpu/lib/dropout.h"
#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// A tensor [B, tokens, heads, K]: strides count elements, K has unit stride.
struct TokenHeads {
  void* data;
  Dtype dtype;
  int64_t batch_stride, token_stride, head_stride;
};

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxHeadsPerKVHead = 1024;

// Blocks of keys [first, end).
struct KeyBlocks {
  int64_t first, end;
};

struct AttentionCall {
  int64_t batch, queries, keys, heads, kv_heads, head_dim;
  float scale;
  TokenHeads q, k, v;
  const int32_t *first, *end;  // [1 or B, T]: query t attends to keys [first, end)
  int64_t range_stride;        // from one batch entry to the next
  Dropout dropout;
  const int32_t *rows, *columns;  // positions of queries [T] and keys [S], with dropout only
  // With dropout, head h of batch entry b is head first_head + b * all_heads + h of its mask.
  int64_t first_head, all_heads;
  TokenHeads out;               // forward
  float* lse;                   // [B, H, T], contiguous
  TokenHeads dout, dq, dk, dv;  // backward
  const float* delta;           // as lse

  // Block sizes: queries, each with all heads of a KV head, and keys.
  int64_t query_block, key_block;

  int64_t heads_per_kv() const { return heads / kv_heads; }
  int64_t sequences() const { return batch * kv_heads; }
  int64_t query_blocks() const { return (queries + query_block - 1) / query_block; }
  int64_t key_blocks() const { return (keys + key_block - 1) / key_block; }

  // The blocks of keys to which a block of queries attends. `first` and `end` do not decrease, so
  // the blocks of queries that attend to a block of keys are a range too.
  KeyBlocks key_blocks_of(int64_t sequence, int64_t query_block_index) const {
    const int64_t offset = sequence / kv_heads * range_stride, i = query_block_index * query_block;
    const int64_t last = (i + query_block < queries ? i + query_block : queries) - 1;
    return {first[offset + i] / key_block, (end[offset + last] + key_block - 1) / key_block};
  }
};

// A sequence is the tokens of one (batch entry, KV head). Memory is aligned to cache lines, sizes
// are in bytes.
struct Attention {
  void (*plan)(AttentionCall& call);  // sets the blocks
  int64_t (*packed_size)(const AttentionCall& call);
  int64_t (*scratch_size)(const AttentionCall& call);
  void (*pack)(const AttentionCall& call, int64_t sequence, int64_t key_block, char* packed);
  // `packed` has all blocks of keys of the sequence.
  void (*attend)(const AttentionCall& call, int64_t sequence, int64_t query_block,
                 const char* packed, char* scratch);
};

// One thread has a block of keys: it accumulates dk and dv in float32 over all blocks of queries
// that attend to it, in ascending order. dq of a block of queries is accumulated in float32 in its
// packed memory: the caller must let the blocks of keys add to it one at a time, in ascending
// order.
struct AttentionBackward {
  void (*plan)(AttentionCall& call);
  int64_t (*packed_size)(const AttentionCall& call);
  int64_t (*scratch_size)(const AttentionCall& call);
  void (*pack)(const AttentionCall& call, int64_t sequence, int64_t query_block, char* packed);
  void (*begin)(const AttentionCall& call, int64_t sequence, int64_t key_block, char* scratch);
  void (*step)(const AttentionCall& call, int64_t sequence, int64_t key_block, int64_t query_block,
               char* packed, char* scratch);
  void (*end)(const AttentionCall& call, int64_t sequence, int64_t key_block, char* scratch);
  void (*write)(const AttentionCall& call, int64_t sequence, int64_t query_block,
                const char* packed);
};

EMU3_KERNELS_WITH_AMX(Attention, attention)
EMU3_KERNELS_WITH_AMX(AttentionBackward, attention_backward)

}  // namespace emu3
