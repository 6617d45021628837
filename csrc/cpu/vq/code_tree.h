// A k-d tree over a codebook, stored in one tensor of 32-bit words. N codes of dimension D; L
// leaves (a power of two, at least 16) of up to 16 codes each. 16 leaves form a group and 16 groups
// a cluster, so that one vector operation tests 16 boxes or 16 codes.
#pragma once

#include <stdint.h>

#include "cpu/lib/levels.h"

namespace emu3 {

constexpr int kLeaf = 16;
constexpr int kMaxDim = 32;

struct CodeTree {
  int dim, num_leaves, num_groups, num_clusters;
  float* split;     // [L] heap order from 1: a query >= split goes to the upper side
  int32_t* axis;    // [L] the coordinate along which a node splits
  float* groups;    // [clusters][D][2][16] lower and upper corner of each group's box
  float* leaves;    // [groups][D][2][16] lower and upper corner of each leaf's box
  int32_t* lowest;  // [groups][16] the lowest id in a leaf
  float* codes;     // [groups * 16][D][16]; lanes without a code are +infinity
  int32_t* ids;     // [groups * 16][16] ascending in a leaf; INT32_MAX in lanes without a code
};

// Returns the size of a tree in words, which depends on these two numbers alone.
int64_t code_tree_size(int64_t num_codes, int dim);

CodeTree view_code_tree(void* memory, int64_t num_codes, int dim);

// The codes of a tree under construction in the order of its nodes, in two copies: a node
// partitions its codes from one into the other. Rows are the coordinates, then the bits of the ids,
// which ascend in a node.
struct CodeOrder {
  int num_codes;
  int64_t stride;  // room for 16 more
  float* rows[2];  // [D + 1][stride]
};

struct CodeBuild {
  // Splits the codes [begin, end) of `node` in copy `which`, and those of its descendants, `levels`
  // deep or down to the leaves.
  void (*grow)(const CodeTree& tree, const CodeOrder& order, int node, int begin, int end,
               int which, int levels);
};

EMU3_KERNELS(CodeBuild, code_build)

// Returns the index at which a node splits. Odd nodes have their upper side first (a Gray code), so
// that consecutive leaves are neighbours in space. Static, so that every level has a copy of its
// own.
static inline int code_border(int node, int begin, int end) {
  const int half = (end - begin) / 2;
  return node & 1 ? end - half : begin + half;
}

// Returns the size of a CodeOrder in words.
int64_t code_order_size(int64_t num_codes, int dim);

// Skips codes with a coordinate that is not finite: they are never the nearest.
CodeOrder begin_code_tree(const CodeTree& tree, void* scratch, const float* codebook,
                          int64_t num_codes);

// Builds node k of the `width` nodes at its depth, which are independent once their ancestors are
// built.
void grow_code_tree(const CodeTree& tree, const CodeOrder& order, int width, int k, int levels);

}  // namespace emu3
