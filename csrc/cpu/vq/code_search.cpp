// nearest_code around the SIMD kernels, the same at every level: sorts queries into packets of 16
// neighbours and writes their ids in the original order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/vq/nearest_code.h"

namespace emu3 {
namespace {

// Queries that are sorted together: enough that 16 neighbours are close, few enough to fit the
// caches.
constexpr int64_t kBlock = 8192;
constexpr int kAtOnce = 8;

// Aligned so that a vector is in one cache line.
struct alignas(64) Lanes {
  float of[16];
};

float to_float(float x) { return x; }

float to_float(uint16_t bfloat16) {
  const uint32_t bits = uint32_t{bfloat16} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A block of queries in float32, [size][dim], and the leaf of each.
class Block {
 public:
  explicit Block(int dim) : dim_(dim) {}

  template <typename T>
  void load(const Queries& z, int64_t begin, int64_t end) {
    size_ = end - begin;
    z_.resize(size_ * dim_);
    float* to = z_.data();
    for (int64_t t = begin; t < end;) {
      const int64_t batch = t / z.positions, position = t % z.positions;
      const int64_t run = std::min(end - t, z.positions - position);
      const T* from =
          static_cast<const T*>(z.data) + batch * z.batch_stride + position * z.position_stride;
      for (int d = 0; d < dim_; ++d)
        for (int64_t i = 0; i < run; ++i)
          to[i * dim_ + d] = to_float(from[d * z.dim_stride + i * z.position_stride]);
      to += run * dim_;
      t += run;
    }
  }

  // Keeps the finite queries, in order. The others have no finite distance to a code: their id is
  // 0, and a search would find no bound and visit every code.
  void keep_finite() {
    order_.resize(size_);
    int32_t count = 0;
    for (int64_t t = 0; t < size_; ++t) {
      float sum = 0;  // of x * 0: NaN unless all are finite
      for (int d = 0; d < dim_; ++d) sum += z_[t * dim_ + d] * 0.0f;
      order_[count] = static_cast<int32_t>(t);
      count += sum == 0;
    }
    order_.resize(count);
  }

  // Sorts by leaf, so that the 16 queries of a packet are neighbours.
  void sort(const CodeTree& tree) {
    leaf_.resize(size_);
    std::vector<int32_t> start(tree.num_leaves + 1);
    for (size_t i = 0; i < order_.size(); i += kAtOnce)
      descend(tree, &order_[i], std::min<int>(kAtOnce, order_.size() - i));
    for (int32_t t : order_) ++start[leaf_[t] + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    sorted_.resize(order_.size());
    for (int32_t t : order_) sorted_[start[leaf_[t]]++] = t;
    order_.swap(sorted_);
  }

  // Packs [packets][dim][16] in order_; the last packet repeats its last query.
  void pack(bool with_home) {
    const int64_t last = static_cast<int64_t>(order_.size()) - 1;
    num_packets_ = (last + 16) / 16;
    packed_.resize(num_packets_ * dim_);
    home_.resize(with_home ? num_packets_ * 16 : 0);
    ids_.resize(num_packets_ * 16);
    auto to = packed_.begin();
    for (int64_t p = 0; p < num_packets_; ++p, to += dim_)
      for (int lane = 0; lane < 16; ++lane) {
        const int32_t t = order_[std::min(p * 16 + lane, last)];
        for (int d = 0; d < dim_; ++d) to[d].of[lane] = z_[int64_t{t} * dim_ + d];
        if (with_home) home_[p * 16 + lane] = leaf_[t];
      }
  }

  void unpack(int64_t* out) const {
    std::fill_n(out, size_, 0);
    for (size_t i = 0; i < order_.size(); ++i) out[order_[i]] = ids_[i];
  }

  const float* packed() const { return reinterpret_cast<const float*>(packed_.data()); }
  const int32_t* home() const { return home_.data(); }
  int32_t* ids() { return ids_.data(); }
  int64_t num_packets() const { return num_packets_; }

 private:
  // Several queries at once hide the latency of the loads. The children of odd nodes are swapped (a
  // Gray code), so that consecutive leaves are neighbours in space.
  void descend(const CodeTree& tree, const int32_t* query, int count) {
    int node[kAtOnce];
    const float* at[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i)
      node[i] = 1, at[i] = &z_[int64_t{query[std::min(i, count - 1)]} * dim_];
    for (int width = 1; width < tree.num_leaves; width *= 2)
      for (int i = 0; i < kAtOnce; ++i) {
        const bool upper = at[i][tree.axis[node[i]]] >= tree.split[node[i]];
        node[i] = 2 * node[i] + (upper ^ (node[i] & 1));
      }
    for (int i = 0; i < count; ++i) leaf_[query[i]] = node[i] - tree.num_leaves;
  }

  int dim_;
  int64_t size_ = 0, num_packets_ = 0;
  std::vector<float> z_;
  std::vector<Lanes> packed_;
  std::vector<int32_t> order_, sorted_, leaf_, home_, ids_;
};

}  // namespace

void find_nearest_codes(const Queries& z, const float* codebook, int64_t num_codes, int dim,
                        const void* tree_memory, int64_t begin, int64_t end, int64_t* out) {
  Block block(dim);
  for (; begin < end; begin += kBlock) {
    const int64_t stop = std::min(end, begin + kBlock);
    if (z.dtype == Dtype::float32) {
      block.load<float>(z, begin, stop);
    } else {
      block.load<uint16_t>(z, begin, stop);
    }
    block.keep_finite();
    if (tree_memory) {
      const CodeTree tree = view_code_tree(const_cast<void*>(tree_memory), num_codes, dim);
      block.sort(tree);
      block.pack(true);
      nearest_code().search(tree, codebook, num_codes, block.packed(), block.home(), block.ids(),
                            block.num_packets());
    } else {
      block.pack(false);
      nearest_code().scan(codebook, num_codes, dim, block.packed(), block.ids(),
                          block.num_packets());
    }
    block.unpack(out + begin);
  }
}

}  // namespace emu3
