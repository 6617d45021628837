// A k-d tree over a codebook, flat in memory so that it travels as one tensor of 32-bit words.
// N codes of dimension D; L leaves (a power of two, 16 or more) of up to 16 codes each; 16 leaves
// make a group and 16 groups a cluster, so that one vector operation tests 16 boxes or 16 codes.
#pragma once

#include <stdint.h>

#include "cpu/lib/levels.h"

namespace emu3 {

constexpr int kLeaf = 16;
constexpr int kMaxDim = 32;

struct CodeTree {
  int dim, num_leaves, num_groups, num_clusters;
  float* split;     // [L] heap order from 1: a query goes to the upper side from here on
  int32_t* axis;    // [L] the coordinate that a node splits
  float* groups;    // [clusters][D][2][16] lower and upper corner of each group's box
  float* leaves;    // [groups][D][2][16] lower and upper corner of each leaf's box
  int32_t* lowest;  // [groups][16] the lowest id in a leaf
  float* codes;     // [groups * 16][D][16]; lanes without a code are +infinity
  int32_t* ids;     // [groups * 16][16] ascending in a leaf; INT32_MAX in lanes without a code
};

// Words that the tree of num_codes codes takes: a function of the two counts alone.
int64_t code_tree_size(int64_t num_codes, int dim);

CodeTree view_code_tree(void* memory, int64_t num_codes, int dim);

// The codes of a tree that grows, in the order of its nodes, which part them from one of two copies
// into the other: coordinates, then the bits of the ids, which ascend in a node.
struct CodeOrder {
  int num_codes;
  int64_t stride;  // room for 16 more
  float* rows[2];  // [D + 1][stride]
};

struct CodeBuild {
  // Splits [begin, end), the codes of `node` in copy `which`, and what is below, `levels` deep or
  // down to the leaves.
  void (*grow)(const CodeTree& tree, const CodeOrder& order, int node, int begin, int end,
               int which, int levels);
};

EMU3_KERNELS(CodeBuild, code_build)

// Where a node is parted. Every other one has its upper side first (a Gray code), so that leaves
// next to each other in number are next to each other in space. Static: a copy for each level.
static inline int code_border(int node, int begin, int end) {
  const int half = (end - begin) / 2;
  return node & 1 ? end - half : begin + half;
}

// Words that the order of num_codes codes takes.
int64_t code_order_size(int64_t num_codes, int dim);

// Codes with a coordinate that is not finite are left out: they are nearest to nothing.
CodeOrder begin_code_tree(const CodeTree& tree, void* scratch, const float* codebook,
                          int64_t num_codes);

// Grows node k of the `width` at its depth, which are independent once all above have grown.
void grow_code_tree(const CodeTree& tree, const CodeOrder& order, int width, int k, int levels);

}  // namespace emu3
