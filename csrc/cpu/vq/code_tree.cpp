#include "cpu/vq/code_tree.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace emu3 {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Assigns memory to the arrays of a tree in order; without memory it only counts words.
struct Layout {
  uint32_t* memory;
  int64_t used = 0;

  template <typename T>
  void take(T*& part, int64_t count) {
    static_assert(sizeof(T) == sizeof(uint32_t));
    part = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += count;
  }
};

int64_t lay_out(CodeTree& tree, void* memory, int64_t num_codes, int dim) {
  tree.dim = dim;
  tree.num_leaves = 16;
  while (int64_t{tree.num_leaves} * kLeaf < num_codes) tree.num_leaves *= 2;
  tree.num_groups = tree.num_leaves / 16;
  tree.num_clusters = (tree.num_groups + 15) / 16;
  Layout layout{static_cast<uint32_t*>(memory)};
  layout.take(tree.split, tree.num_leaves);
  layout.take(tree.axis, tree.num_leaves);
  layout.take(tree.groups, int64_t{tree.num_clusters} * dim * 32);
  layout.take(tree.leaves, int64_t{tree.num_groups} * dim * 32);
  layout.take(tree.lowest, tree.num_leaves);
  layout.take(tree.codes, int64_t{tree.num_leaves} * dim * kLeaf);
  layout.take(tree.ids, int64_t{tree.num_leaves} * kLeaf);
  return layout.used;
}

bool is_finite(const float* code, int dim) {
  float sum = 0;  // of x * 0: NaN unless all are finite
  for (int d = 0; d < dim; ++d) sum += code[d] * 0.0f;
  return sum == 0;
}

// Transposes the finite codes to rows of coordinates and a row of ids.
template <int kDim>
int transpose(const float* codebook, int64_t num_codes, int any_dim, float* rows, int64_t stride) {
  const int dim = kDim ? kDim : any_dim;
  int count = 0;
  for (int64_t n = 0; n < num_codes; ++n, codebook += dim) {
    const int32_t id = static_cast<int32_t>(n);
    for (int d = 0; d < dim; ++d) rows[d * stride + count] = codebook[d];
    std::memcpy(rows + dim * stride + count, &id, sizeof id);
    count += is_finite(codebook, dim);
  }
  return count;
}

}  // namespace

int64_t code_tree_size(int64_t num_codes, int dim) {
  CodeTree tree;
  return lay_out(tree, nullptr, num_codes, dim);
}

CodeTree view_code_tree(void* memory, int64_t num_codes, int dim) {
  CodeTree tree;
  lay_out(tree, memory, num_codes, dim);
  return tree;
}

int64_t code_order_size(int64_t num_codes, int dim) { return 2 * (dim + 1) * (num_codes + 16); }

CodeOrder begin_code_tree(const CodeTree& tree, void* scratch, const float* codebook,
                          int64_t num_codes) {
  const int64_t stride = num_codes + 16;
  float* rows = static_cast<float*>(scratch);
  const auto fill = tree.dim == 4 ? transpose<4> : transpose<0>;
  const CodeOrder order{fill(codebook, num_codes, tree.dim, rows, stride),
                        stride,
                        {rows, rows + (tree.dim + 1) * stride}};
  // Empty boxes are [+infinity, -infinity]: at an infinite distance from every query.
  for (int64_t i = 0; i < int64_t{tree.num_clusters} * tree.dim; ++i) {
    std::fill_n(tree.groups + i * 32, 16, kInfinity);
    std::fill_n(tree.groups + i * 32 + 16, 16, -kInfinity);
  }
  tree.split[0] = 0, tree.axis[0] = 0;  // unused: the root is node 1
  return order;
}

void grow_code_tree(const CodeTree& tree, const CodeOrder& order, int width, int k, int levels) {
  int node = 1, begin = 0, end = order.num_codes, which = 0;
  for (int level = width / 2; level; level /= 2, which = !which) {
    const int border = code_border(node, begin, end);
    const bool second = k & level;
    (second ? begin : end) = border;
    node = 2 * node + second;
  }
  code_build().grow(tree, order, node, begin, end, which, levels);
}

}  // namespace emu3
