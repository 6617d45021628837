#include "nearest_code.h"

#include "lanes16.h"

namespace emu3::EMU3_LEVEL {
namespace {

// Why pruning by boxes is exact although everything is rounded. For a code c inside [low, high] and
// a query q, each coordinate of q - clamp(q, low, high) is no larger than |q - c| before rounding;
// rounding is monotone, and so are the rounded square and the rounded sum in the same order. So the
// distance to the box, computed exactly as a distance to a code, never exceeds the computed
// distance to any code in it. A box at exactly the best distance is left out only if it holds no id
// below the best one.

constexpr float kInfinity = __builtin_inff();

// Pairs (leaf, lane) that wait to be scanned; a group adds at most 256, and the store writes 16.
constexpr int kPairs = 1024;
constexpr int kPairsOfGroup = 256;

// A scanned pair costs 1.6 times its share of a scan of all codes (measured), so that a packet
// which has scanned this part of all pairs is better off, and the ones after it likely are.
constexpr int kGiveUp = 4;
constexpr int kLongestPause = 64;

template <int kDim>
inline int dim_of(int dim) {
  return kDim ? kDim : dim;
}

// Sum of squares over d, in order, each operation rounded.
template <int kDim, typename Difference>
inline Floats sum_of_squares(int dim, Difference difference) {
  const Floats first = difference(0);
  Floats sum = first * first;
  for (int d = 1; d < dim_of<kDim>(dim); ++d) {
    const Floats x = difference(d);
    sum = sum + x * x;
  }
  return sum;
}

// Sixteen boxes, [dim][2][16].
struct Boxes {
  const float* corners;
  Floats low(int d) const { return load16(corners + d * 32); }
  Floats high(int d) const { return load16(corners + d * 32 + 16); }
  float low(int d, int box) const { return corners[d * 32 + box]; }
  float high(int d, int box) const { return corners[d * 32 + 16 + box]; }
};

// All codes against kPackets packets: the least of 16 codes is kept, and only the id of the 16.
template <int kDim, int kPackets>
void scan_packets(const float* codebook, int64_t num_codes, int dim, const float* queries,
                  int32_t* ids) {
  const int num_dims = dim_of<kDim>(dim);
  Floats best[kPackets];
  Ints block[kPackets];
  for (int p = 0; p < kPackets; ++p) best[p] = splat16(kInfinity), block[p] = splat16(0);
  for (int64_t first = 0; first < num_codes; first += 16) {
    const int64_t end = first + 16 < num_codes ? first + 16 : num_codes;
    Floats low[kPackets];
    for (int p = 0; p < kPackets; ++p) low[p] = splat16(kInfinity);
    for (int64_t n = first; n < end; ++n)
      for (int p = 0; p < kPackets; ++p) {
        const Floats distance = sum_of_squares<kDim>(dim, [&](int d) {
          return load16(queries + (p * num_dims + d) * 16) - splat16(codebook[n * num_dims + d]);
        });
        low[p] = min(distance, low[p]);  // low[p] where the distance is NaN
      }
    for (int p = 0; p < kPackets; ++p) {
      block[p] = select_less(low[p], best[p], splat16(static_cast<int32_t>(first)), block[p]);
      best[p] = min(low[p], best[p]);
    }
  }
  for (int p = 0; p < kPackets; ++p) {
    float distance[16];
    store16(distance, best[p]);
    store16(ids + p * 16, block[p]);
    for (int lane = 0; lane < 16; ++lane) {
      int32_t& id = ids[p * 16 + lane];
      for (; distance[lane] < kInfinity; ++id) {
        float sum = 0;
        for (int d = 0; d < num_dims; ++d) {
          const float x =
              queries[(p * num_dims + d) * 16 + lane] - codebook[id * int64_t{num_dims} + d];
          sum += x * x;
        }
        if (sum == distance[lane]) break;
      }
    }
  }
}

template <int kDim>
void scan_all(const float* codebook, int64_t num_codes, int dim, const float* queries, int32_t* ids,
              int64_t num_packets) {
  constexpr int kPackets = kParts == 1 ? 2 : 1;  // what the registers hold
  const int64_t queries_of_packet = dim_of<kDim>(dim) * 16;
  int64_t p = 0;
  for (; p + kPackets <= num_packets; p += kPackets)
    scan_packets<kDim, kPackets>(codebook, num_codes, dim, queries + p * queries_of_packet,
                                 ids + p * 16);
  for (; p < num_packets; ++p)
    scan_packets<kDim, 1>(codebook, num_codes, dim, queries + p * queries_of_packet, ids + p * 16);
}

// The search for the 16 queries of one packet.
template <int kDim>
struct Packet {
  const CodeTree& tree;
  const float* queries;  // [dim][16]
  const int32_t* home;
  int32_t* id;
  float best[16];
  int32_t pairs[kPairs + 16];
  int num_pairs = 0;
  int64_t num_scanned = 0;

  int dim() const { return dim_of<kDim>(tree.dim); }
  Floats query(int d) const { return load16(queries + d * 16); }
  Floats query(int d, int lane) const { return splat16(queries[d * 16 + lane]); }
  int64_t box_floats() const { return int64_t{dim()} * 32; }

  void scan_leaf(int leaf, int lane) {
    const float* codes = tree.codes + int64_t{leaf} * dim() * kLeaf;
    const Floats distance = sum_of_squares<kDim>(
        tree.dim, [&](int d) { return load16(codes + d * kLeaf) - query(d, lane); });
    if (!less_or_equal(distance, splat16(best[lane]))) return;
    const float low = least(distance);
    const int32_t found = tree.ids[leaf * kLeaf + __builtin_ctz(equal(distance, splat16(low)))];
    const bool better = low < best[lane] || found < id[lane];
    id[lane] = better ? found : id[lane];
    best[lane] = low;
  }

  void scan_pairs() {
    for (int i = 0; i < num_pairs; ++i) scan_leaf(pairs[i] / 16, pairs[i] % 16);
    num_scanned += num_pairs;
    num_pairs = 0;
  }

  // Distance from one query to 16 boxes.
  Floats to_boxes(int lane, Boxes boxes) const {
    return sum_of_squares<kDim>(tree.dim, [&](int d) {
      const Floats q = query(d, lane);
      return q - min(max(q, boxes.low(d)), boxes.high(d));
    });
  }

  // Distance from 16 queries to one box.
  Floats to_box(Boxes boxes, int box) const {
    return sum_of_squares<kDim>(tree.dim, [&](int d) {
      const Floats q = query(d);
      return q - min(max(q, splat16(boxes.low(d, box))), splat16(boxes.high(d, box)));
    });
  }

  // Groups of a cluster that may hold a better code for some query, judged by the packet's own box.
  unsigned groups_within(Boxes boxes, const float* low, const float* high, float most) const {
    const Floats distance = sum_of_squares<kDim>(tree.dim, [&](int d) {
      const Floats gap = max(boxes.low(d) - splat16(high[d]), splat16(low[d]) - boxes.high(d));
      return max(gap, splat16(0.0f));
    });
    return less_or_equal(distance, splat16(most));
  }

  // The leaves of a group that may hold a better code, for the queries in `lanes`.
  void collect(int group, unsigned lanes) {
    const Boxes boxes{tree.leaves + group * box_floats()};
    const Ints lowest = load16(tree.lowest + group * 16);
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      const Floats distance = to_boxes(lane, boxes), bound = splat16(best[lane]);
      unsigned leaves = less(distance, bound);
      leaves |= equal(distance, bound) & less(lowest, splat16(id[lane]));
      if (home[lane] / 16 == group) leaves &= ~(1u << (home[lane] % 16));
      const Ints pair = splat16(group * 256 + lane) + load16(kLeafOfPair);
      num_pairs += store_packed(pairs + num_pairs, pair, leaves);
    }
    if (num_pairs > kPairs - kPairsOfGroup) scan_pairs();
  }

  // The nearest leaf of the nearest group: for queries whose home says little about where to look.
  void scan_nearest_leaf(int lane) {
    float near = kInfinity;
    int group = 0;
    for (int c = 0; c < tree.num_clusters; ++c) {
      const Floats distance = to_boxes(lane, {tree.groups + c * box_floats()});
      const float low = least(distance);
      if (low < near) near = low, group = c * 16 + __builtin_ctz(equal(distance, splat16(low)));
    }
    const Floats distance = to_boxes(lane, {tree.leaves + group * box_floats()});
    scan_leaf(group * 16 + __builtin_ctz(equal(distance, splat16(least(distance)))), lane);
  }

  // False if it gave up: too much of the tree had to be scanned.
  bool search(int64_t most_pairs) {
    float low[kMaxDim], high[kMaxDim];
    for (int d = 0; d < dim(); ++d) low[d] = least(query(d)), high[d] = greatest(query(d));
    for (int lane = 0; lane < 16; ++lane) {
      best[lane] = kInfinity, id[lane] = 0;
      scan_leaf(home[lane], lane);
    }
    const int first = home[0] / 16, last = home[15] / 16;  // homes ascend within a packet
    for (int group = first; group <= last; ++group) collect(group, 0xffff);
    scan_pairs();

    float most = greatest(load16(best));
    int within = 0;
    for (int c = 0; c < tree.num_clusters; ++c)
      within +=
          __builtin_popcount(groups_within({tree.groups + c * box_floats()}, low, high, most));
    if (2 * within > tree.num_groups) {
      for (int lane = 0; lane < 16; ++lane) scan_nearest_leaf(lane);
      most = greatest(load16(best));
    }
    for (int c = 0; c < tree.num_clusters; ++c) {
      const Boxes boxes{tree.groups + c * box_floats()};
      for (unsigned groups = groups_within(boxes, low, high, most); groups; groups &= groups - 1) {
        const int box = __builtin_ctz(groups), group = c * 16 + box;
        if (group >= first && group <= last) continue;
        collect(group, less_or_equal(to_box(boxes, box), load16(best)));
        if (num_scanned > most_pairs) return false;
      }
    }
    scan_pairs();
    return true;
  }

  alignas(64) static constexpr int32_t kLeafOfPair[16] = {0,   16,  32,  48,  64,  80,  96,  112,
                                                          128, 144, 160, 176, 192, 208, 224, 240};
};

template <int kDim>
void search_all(const CodeTree& tree, const float* codebook, int64_t num_codes,
                const float* queries, const int32_t* home, int32_t* ids, int64_t num_packets) {
  const int64_t queries_of_packet = dim_of<kDim>(tree.dim) * 16;
  const int64_t most_pairs = int64_t{tree.num_leaves} * 16 / kGiveUp;
  int64_t pause = 1, resume = 0;
  for (int64_t p = 0; p < num_packets; ++p) {
    const float* packet = queries + p * queries_of_packet;
    if (p >= resume) {
      if (Packet<kDim>{tree, packet, home + p * 16, ids + p * 16}.search(most_pairs)) {
        pause = 1;
        continue;
      }
      resume = p + pause;
      pause = pause < kLongestPause ? 2 * pause : pause;
    }
    scan_packets<kDim, 1>(codebook, num_codes, tree.dim, packet, ids + p * 16);
  }
}

void search(const CodeTree& tree, const float* codebook, int64_t num_codes, const float* queries,
            const int32_t* home, int32_t* ids, int64_t num_packets) {
  const auto run = tree.dim == 4 ? search_all<4> : tree.dim == 8 ? search_all<8> : search_all<0>;
  run(tree, codebook, num_codes, queries, home, ids, num_packets);
}

void scan(const float* codebook, int64_t num_codes, int dim, const float* queries, int32_t* ids,
          int64_t num_packets) {
  const auto run = dim == 4 ? scan_all<4> : dim == 8 ? scan_all<8> : scan_all<0>;
  run(codebook, num_codes, dim, queries, ids, num_packets);
}

}  // namespace

extern const NearestCode nearest_code{search, scan};

}  // namespace emu3::EMU3_LEVEL
