// Builds the k-d tree of code_tree.h: every node splits its codes at the median along the longest
// side of their bounding box.
#include "cpu/vq/code_tree.h"
#include "cpu/lib/lanes16.h"

namespace emu3::EMU3_LEVEL {
namespace {

constexpr float kInfinity = __builtin_inff();

// Maps finite floats to integers in the same order.
inline int32_t to_rank(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float from_rank(int32_t rank) {
  rank ^= (rank >> 31) & 0x7fffffff;
  float x;
  __builtin_memcpy(&x, &rank, sizeof x);
  return x;
}

// Returns the mask of the 16 elements from i on that come before `end`.
inline unsigned lanes_before(int end, int i) {
  return end - i < 16 ? (1u << (end - i)) - 1 : 0xffff;
}

inline int count_below(const float* keys, int begin, int end, float x) {
  int count = 0;
  for (int i = begin; i < end; i += 16)
    count += __builtin_popcount(less(load16(keys + i), splat16(x)) & lanes_before(end, i));
  return count;
}

template <int kDim>
struct Builder {
  const CodeTree& tree;
  const CodeOrder& order;

  int dim() const { return kDim ? kDim : tree.dim; }
  float* row(int which, int d) const { return order.rows[which] + d * order.stride; }

  struct Box {
    float low[kDim ? kDim : kMaxDim], high[kDim ? kDim : kMaxDim];
  };

  Box box_of(int which, int begin, int end) const {
    Box box;
    for (int axis = 0; axis < dim(); ++axis) {
      const float* x = row(which, axis);
      Floats low = splat16(kInfinity), high = splat16(-kInfinity);
      int i = begin;
      for (; i + 16 <= end; i += 16) low = min(low, load16(x + i)), high = max(high, load16(x + i));
      if (i < end) {
        low = min(low, first_of(load16(x + i), end - i, kInfinity));
        high = max(high, first_of(load16(x + i), end - i, -kInfinity));
      }
      box.low[axis] = reduce_min(low), box.high[axis] = reduce_max(high);
    }
    return box;
  }

  int longest_axis(const Box& box) const {
    int longest = 0;
    float most = 0;
    for (int axis = 0; axis < dim(); ++axis) {
      const float length =
          box.high[axis] / 2 - box.low[axis] / 2;  // halves: high - low can overflow
      if (length > most) most = length, longest = axis;
    }
    return longest;
  }

  struct Border {
    float at;
    int below;  // keys
  };

  // Returns the greatest float in [low, high] below which there are at most `half` keys, or any
  // below which there are exactly `half`, by bisection.
  static Border find_median(const float* keys, int begin, int end, int half, float low,
                            float high) {
    int32_t low_rank = to_rank(low), high_rank = to_rank(high);
    int below = 0;
    while (low_rank < high_rank && below != half) {
      const int32_t middle = high_rank - static_cast<int32_t>((int64_t{high_rank} - low_rank) / 2);
      const int count = count_below(keys, begin, end, from_rank(middle));
      if (count <= half) {
        low_rank = middle, below = count;
      } else {
        high_rank = middle - 1;
      }
    }
    return {from_rank(low_rank), below};
  }

  // Partitions [begin, end) into the other copy; ids ascend on both sides. Returns the border.
  int split(int node, int begin, int end, int which) const {
    const int half = (end - begin) / 2, border = code_border(node, begin, end);
    const Box box = box_of(which, begin, end);
    const int axis = longest_axis(box);
    const float* keys = row(which, axis);
    const auto [at, below] = find_median(keys, begin, end, half, box.low[axis], box.high[axis]);
    tree.axis[node] = axis;
    tree.split[node] = at;
    int ties = half - below;  // keys equal to the median that go to the lower side
    int lower = node & 1 ? border : begin, upper = node & 1 ? begin : border;
    for (int i = begin; i < end; i += 16) {
      const unsigned all = lanes_before(end, i);
      const Floats key = load16(keys + i);
      unsigned low = less(key, splat16(at)) & all;
      if (ties > 0)
        for (unsigned tied = equal(key, splat16(at)) & all; tied && ties > 0; tied &= tied - 1)
          low |= tied & -tied, --ties;
      const unsigned high = all & ~low;
      for (int d = 0; d <= dim(); ++d) {
        const Floats x = load16(row(which, d) + i);
        store_packed_alone(row(!which, d) + lower, x, low);
        store_packed_alone(row(!which, d) + upper, x, high);
      }
      lower += __builtin_popcount(low), upper += __builtin_popcount(high);
    }
    return border;
  }

  void fill(int leaf, int begin, int end, int which) const {
    const Box box = box_of(which, begin, end);
    Ints ids;
    __builtin_memcpy(&ids, row(which, dim()) + begin, sizeof ids);
    ids = first_of(ids, end - begin, INT32_MAX);
    store16(tree.ids + leaf * kLeaf, ids);
    tree.lowest[leaf] = tree.ids[leaf * kLeaf];
    for (int axis = 0; axis < dim(); ++axis) {
      const Floats x = first_of(load16(row(which, axis) + begin), end - begin, kInfinity);
      store16(tree.codes + (int64_t{leaf} * dim() + axis) * kLeaf, x);
      float* corner = tree.leaves + (int64_t{leaf / 16} * dim() + axis) * 32 + leaf % 16;
      corner[0] = box.low[axis], corner[16] = box.high[axis];
    }
  }

  // Computes the box of a group of 16 leaves after they have been filled.
  void enclose(int group) const {
    for (int axis = 0; axis < dim(); ++axis) {
      const float* leaves = tree.leaves + (int64_t{group} * dim() + axis) * 32;
      float* corner = tree.groups + (int64_t{group / 16} * dim() + axis) * 32 + group % 16;
      corner[0] = reduce_min(load16(leaves)), corner[16] = reduce_max(load16(leaves + 16));
    }
  }

  void grow(int node, int begin, int end, int which, int levels) const {
    if (node >= tree.num_leaves) return fill(node - tree.num_leaves, begin, end, which);
    if (!levels) return;
    const int border = split(node, begin, end, which);
    grow(2 * node, begin, border, !which, levels - 1);
    grow(2 * node + 1, border, end, !which, levels - 1);
    const int group = node - tree.num_groups;
    if (0 <= group && group < tree.num_groups) enclose(group);
  }
};

void grow(const CodeTree& tree, const CodeOrder& order, int node, int begin, int end, int which,
          int levels) {
  if (tree.dim == 4) {
    Builder<4>{tree, order}.grow(node, begin, end, which, levels);
  } else {
    Builder<0>{tree, order}.grow(node, begin, end, which, levels);
  }
}

}  // namespace

extern const CodeBuild code_build{grow};

}  // namespace emu3::EMU3_LEVEL
