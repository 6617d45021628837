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

constexpr int64_t kMostWidth = 256;    // of a head
constexpr int64_t kMostShared = 1024;  // heads of queries to one of keys

// Blocks of keys [first, end).
struct KeyBlocks {
  int64_t first, end;
};

struct AttentionCall {
  int64_t batch, queries, keys, heads, groups, width;
  float scale;
  TokenHeads q, k, v;
  const int32_t *first, *end;  // the span of each query, [1 or B, T]
  int64_t span_stride;         // from one sequence to the next
  Dropout dropout;
  const int32_t *rows, *columns;  // positions of queries [T] and keys [S] where any is dropped
  TokenHeads out;                 // forward
  float* lse;                     // [B, H, T] without gaps
  TokenHeads dout, dq, dk, dv;    // backward
  const float* delta;             // as lse

  // Queries of a task in one group, with all heads of theirs, and keys.
  int64_t query_block, key_block;

  int64_t shared() const { return heads / groups; }
  int64_t sequences() const { return batch * groups; }
  int64_t query_blocks() const { return (queries + query_block - 1) / query_block; }
  int64_t key_blocks() const { return (keys + key_block - 1) / key_block; }

  // Blocks of keys that a block of queries meets; the blocks of queries that a block of keys meets
  // are a range too, as spans do not decrease.
  KeyBlocks met(int64_t sequence, int64_t query_block_index) const {
    const int64_t span = sequence / groups * span_stride, i = query_block_index * query_block;
    const int64_t last = (i + query_block < queries ? i + query_block : queries) - 1;
    return {first[span + i] / key_block, (end[span + last] + key_block - 1) / key_block};
  }
};

// A sequence is the tokens of a (batch, group); memory is aligned to cache lines, sizes are bytes.
struct Attention {
  void (*plan)(AttentionCall& call);  // sets the blocks
  int64_t (*packed_size)(const AttentionCall& call);
  int64_t (*scratch_size)(const AttentionCall& call);
  void (*pack)(const AttentionCall& call, int64_t sequence, int64_t key_block, char* packed);
  // `packed` holds all blocks of keys of the sequence.
  void (*attend)(const AttentionCall& call, int64_t sequence, int64_t query_block,
                 const char* packed, char* scratch);
};

// A block of keys, its gradients in float32 and all blocks of queries that meet it, in their order,
// are one thread's. The gradient of a block of queries lies in float32 beside its packed form; it
// is for the caller to see that blocks of keys add to it one at a time, in their order.
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
