// A k-d tree over a codebook, flat in memory so that it travels as one tensor of 32-bit words.
// N codes of dimension D; L leaves (a power of two) of up to 16 codes each; 16 leaves make a group
// and 16 groups a cluster, so that one vector operation tests 16 boxes or 16 codes.
#pragma once

#include <stdint.h>

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

// Codes with a coordinate that is not finite are left out: they are nearest to nothing.
void build_code_tree(void* memory, const float* codebook, int64_t num_codes, int dim);

}  // namespace emu3
