#include "code_tree.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace emu3 {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int divide_up(int64_t a, int b) { return static_cast<int>((a + b - 1) / b); }

bool is_finite(const float* code, int dim) {
  return std::all_of(code, code + dim, [](float x) { return std::isfinite(x); });
}

template <int kDim>
class Builder {
 public:
  Builder(const CodeTree& tree, const float* codebook, int64_t num_codes)
      : tree_(tree), codebook_(codebook) {
    for (int64_t n = 0; n < num_codes; ++n)
      if (is_finite(codebook + n * tree.dim, tree.dim)) order_.push_back(static_cast<int32_t>(n));
    next_.resize(order_.size());
    keys_.resize(order_.size());
    sorted_.resize(order_.size() + 1);
    start_ = {0, static_cast<int>(order_.size())};
  }

  void run() {
    for (int width = 1; width < tree_.num_leaves; width *= 2) {
      std::vector<int> start(2 * width + 1, start_.back());
      for (int k = 0; k < width; ++k) {
        start[2 * k] = start_[k];
        start[2 * k + 1] = split(width + k, k & 1, start_[k], start_[k + 1]);
      }
      start_.swap(start);
      order_.swap(next_);
    }
    clear();
    for (int leaf = 0; leaf < tree_.num_leaves; ++leaf) fill(leaf);
  }

 private:
  int dim() const { return kDim ? kDim : tree_.dim; }
  float at(int i, int axis) const { return codebook_[int64_t{order_[i]} * dim() + axis]; }

  struct Span {
    int axis;
    float low, high;
  };

  Span longest(int begin, int end) const {
    float low[kMaxDim], high[kMaxDim];
    std::fill_n(low, kMaxDim, kInfinity);
    std::fill_n(high, kMaxDim, -kInfinity);
    for (int i = begin; i < end; ++i) {
      const float* code = codebook_ + int64_t{order_[i]} * dim();
      for (int axis = 0; axis < dim(); ++axis) {
        low[axis] = std::min(low[axis], code[axis]);
        high[axis] = std::max(high[axis], code[axis]);
      }
    }
    int longest = 0;
    for (int axis = 1; axis < dim(); ++axis)
      // Halved first: the difference can overflow.
      if (high[axis] / 2 - low[axis] / 2 > high[longest] / 2 - low[longest] / 2) longest = axis;
    return {longest, low[longest], high[longest]};
  }

  // The key of rank `rank` in keys_[begin, end): by a histogram, then among the keys of one bin.
  float select(int begin, int end, int rank, Span span) {
    constexpr int kBins = 256;
    const float scale = (kBins - 1) / (span.high - span.low);
    auto first = sorted_.begin();
    if (end - begin < kBins || !std::isfinite(scale) || scale == 0) {
      std::copy(&keys_[begin], &keys_[begin] + (end - begin), first);
      std::nth_element(first, first + rank, first + (end - begin));
      return first[rank];
    }
    const auto bin = [&](float key) { return static_cast<int>((key - span.low) * scale); };
    int count[kBins] = {};
    for (int i = begin; i < end; ++i) ++count[bin(keys_[i])];
    int wanted = 0;
    for (; rank >= count[wanted]; ++wanted) rank -= count[wanted];
    auto last = first;
    for (int i = begin; i < end; ++i) {
      *last = keys_[i];
      last += bin(keys_[i]) == wanted;
    }
    std::nth_element(first, first + rank, last);
    return first[rank];
  }

  // Parts order_[begin, end) at the median into next_, keeping ids ascending; returns the border.
  int split(int node, bool mirrored, int begin, int end) {
    const int half = (end - begin) / 2;
    const Span span = longest(begin, end);
    for (int i = begin; i < end; ++i) keys_[i] = at(i, span.axis);
    const float median = begin < end ? select(begin, end, half, span) : 0;
    tree_.axis[node] = span.axis;
    tree_.split[node] = median;
    int equal_to_lower = half;
    for (int i = begin; i < end; ++i) equal_to_lower -= keys_[i] < median;
    int lower = mirrored ? end - half : begin, upper = mirrored ? begin : begin + half;
    const float* keys = keys_.data();  // without branches: which side is a coin's toss
    const int32_t* order = order_.data();
    int32_t* next = next_.data();
    for (int i = begin; i < end; ++i) {
      const int equal = (keys[i] == median) & (equal_to_lower > 0);
      const int low = (keys[i] < median) | equal;
      equal_to_lower -= equal;
      next[upper + ((lower - upper) & -low)] = order[i];
      lower += low;
      upper += 1 - low;
    }
    return mirrored ? end - half : begin + half;
  }

  // Boxes that hold nothing run from +infinity to -infinity: at an infinite distance from
  // everything.
  void clear() {
    const int leaves = tree_.num_groups * 16;
    const auto empty = [dim = dim()](float* boxes, int count) {
      for (int i = 0; i < count * dim; ++i)
        for (int j = 0; j < 32; ++j) boxes[i * 32 + j] = j < 16 ? kInfinity : -kInfinity;
    };
    empty(tree_.groups, tree_.num_clusters);
    empty(tree_.leaves, tree_.num_groups);
    std::fill_n(tree_.codes, int64_t{leaves} * dim() * kLeaf, kInfinity);
    std::fill_n(tree_.ids, leaves * kLeaf, std::numeric_limits<int32_t>::max());
    std::fill_n(tree_.lowest, leaves, std::numeric_limits<int32_t>::max());
  }

  void fill(int leaf) {
    for (int i = start_[leaf]; i < start_[leaf + 1]; ++i) {
      const int lane = i - start_[leaf];
      tree_.ids[leaf * kLeaf + lane] = order_[i];
      tree_.lowest[leaf] = std::min(tree_.lowest[leaf], order_[i]);
      for (int axis = 0; axis < dim(); ++axis) {
        tree_.codes[(int64_t{leaf} * dim() + axis) * kLeaf + lane] = at(i, axis);
        widen(tree_.leaves, leaf, axis, at(i, axis));
        widen(tree_.groups, leaf / 16, axis, at(i, axis));
      }
    }
  }

  void widen(float* boxes, int box, int axis, float x) const {
    float* low = boxes + (int64_t{box / 16} * dim() + axis) * 32 + box % 16;
    low[0] = std::min(low[0], x);
    low[16] = std::max(low[16], x);
  }

  CodeTree tree_;
  const float* codebook_;
  std::vector<int32_t> order_, next_;
  std::vector<float> keys_, sorted_;
  std::vector<int> start_;
};

// Hands out the parts of the tree in order; with no memory it only counts.
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
  tree.num_leaves = 1;
  while (int64_t{tree.num_leaves} * kLeaf < num_codes) tree.num_leaves *= 2;
  tree.num_groups = divide_up(tree.num_leaves, 16);
  tree.num_clusters = divide_up(tree.num_groups, 16);
  const int64_t leaves = tree.num_groups * 16;
  Layout layout{static_cast<uint32_t*>(memory)};
  layout.take(tree.split, leaves);
  layout.take(tree.axis, leaves);
  layout.take(tree.groups, int64_t{tree.num_clusters} * dim * 32);
  layout.take(tree.leaves, int64_t{tree.num_groups} * dim * 32);
  layout.take(tree.lowest, leaves);
  layout.take(tree.codes, leaves * dim * kLeaf);
  layout.take(tree.ids, leaves * kLeaf);
  return layout.used;
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

void build_code_tree(void* memory, const float* codebook, int64_t num_codes, int dim) {
  const CodeTree tree = view_code_tree(memory, num_codes, dim);
  std::fill_n(static_cast<uint32_t*>(memory), code_tree_size(num_codes, dim), 0);
  if (dim == 4) {
    Builder<4>(tree, codebook, num_codes).run();
  } else {
    Builder<0>(tree, codebook, num_codes).run();
  }
}

}  // namespace emu3
