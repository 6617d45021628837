#include "cpu/vq/nearest_code.h"

#include "cpu/lib/lanes16.h"

namespace emu3::EMU3_LEVEL {
namespace {

// Pruning by boxes is exact in spite of rounding: for a code c inside [low, high] and a query q,
// each coordinate of |q - clamp(q, low, high)| is at most |q - c| before rounding. Rounding is
// monotone, and so are the rounded square and the rounded sum in the same order. Hence the distance
// to a box, computed with the operations of a distance to a code, never exceeds the computed
// distance to any code in it. A box at exactly the best distance is skipped only if it has no id
// below the best one.

constexpr float kInfinity = __builtin_inff(), kGreatest = __FLT_MAX__;

// Capacities of the lists of a packet; one vector appends up to 16.
constexpr int kGroups = 256, kVisits = 256, kPairs = 1024;

// A (leaf, query) pair costs 1.6 times its share of a scan of all codes (measured). A packet that
// has visited 1 / kGiveUp of all pairs therefore scans all codes instead, and so do the next
// packets.
constexpr int kGiveUp = 4;
constexpr int kLongestPause = 64;

template <int kDim>
inline int dim_of(int dim) {
  return kDim ? kDim : dim;
}

// Returns the sum of squares over d, in order, with every operation rounded.
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

// Scans all codes for kPackets packets: keeps the minimum over 16 codes with the index of the first
// of them, and searches for the id among the 16 at the end.
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
  constexpr int kPackets = kParts == 1 ? 2 : 1;  // that fit the registers
  const int64_t queries_of_packet = dim_of<kDim>(dim) * 16;
  int64_t p = 0;
  for (; p + kPackets <= num_packets; p += kPackets)
    scan_packets<kDim, kPackets>(codebook, num_codes, dim, queries + p * queries_of_packet,
                                 ids + p * 16);
  for (; p < num_packets; ++p)
    scan_packets<kDim, 1>(codebook, num_codes, dim, queries + p * queries_of_packet, ids + p * 16);
}

// The search for the 16 queries of one packet. Candidates are listed first and then visited in one
// long loop, since the exit of every short loop is a mispredicted branch.
template <int kDim>
struct Packet {
  const CodeTree& tree;
  const float* queries;  // [dim][16]
  const int32_t* home;
  int32_t* id;
  alignas(64) float best[16];
  int32_t groups[kGroups];
  int32_t visits[kVisits], pairs[kPairs];  // group * 16 + lane, leaf * 16 + lane
  int num_visits = 0, num_pairs = 0;
  int64_t num_scanned = 0;

  int dim() const { return dim_of<kDim>(tree.dim); }
  Floats query(int d) const { return load16(queries + d * 16); }
  Floats query(int d, int lane) const { return splat16(queries[d * 16 + lane]); }
  int64_t box_floats() const { return int64_t{dim()} * 32; }

  Floats to_leaf(uint32_t leaf, int lane) const {
    const float* codes = tree.codes + int64_t{leaf} * dim() * kLeaf;
    return sum_of_squares<kDim>(tree.dim,
                                [&](int d) { return load16(codes + d * kLeaf) - query(d, lane); });
  }

  int32_t id_at(uint32_t leaf, const Floats& distance, float low) const {
    return tree.ids[leaf * kLeaf + __builtin_ctz(equal(distance, splat16(low)))];
  }

  void scan_leaf(uint32_t leaf, int lane) {
    const Floats distance = to_leaf(leaf, lane);
    if (!less_or_equal(distance, splat16(best[lane]))) return;
    const float low = reduce_min(distance);
    const int32_t found = id_at(leaf, distance, low);
    const bool better = low < best[lane] || found < id[lane];
    id[lane] = better ? found : id[lane];
    best[lane] = low;
  }

  void scan_pairs() {
    for (int i = 0; i < num_pairs; ++i) {
      const uint32_t pair = pairs[i];
      scan_leaf(pair / 16, pair % 16);
    }
    num_scanned += num_pairs;
    num_pairs = 0;
  }

  // Returns the distance from one query to 16 boxes.
  Floats to_boxes(int lane, Boxes boxes) const {
    return sum_of_squares<kDim>(tree.dim, [&](int d) {
      const Floats q = query(d, lane);
      return q - min(max(q, boxes.low(d)), boxes.high(d));
    });
  }

  // Returns the distance from 16 queries to one box.
  Floats to_box(Boxes boxes, int box) const {
    return sum_of_squares<kDim>(tree.dim, [&](int d) {
      const Floats q = query(d);
      return q - min(max(q, splat16(boxes.low(d, box))), splat16(boxes.high(d, box)));
    });
  }

  // Lists the groups that may have a better code for some query, by distance to the box of the
  // packet.
  int list_groups(int begin, int end, const float* low, const float* high) {
    // An infinite distance, as to an empty box, is never better.
    const Floats most = min(splat16(reduce_max(load16(best))), splat16(kGreatest));
    int count = 0;
    for (int c = begin; c < end; ++c) {
      const Boxes boxes{tree.groups + c * box_floats()};
      const Floats distance = sum_of_squares<kDim>(tree.dim, [&](int d) {
        const Floats gap = max(boxes.low(d) - splat16(high[d]), splat16(low[d]) - boxes.high(d));
        return max(gap, splat16(0.0f));
      });
      count += store_packed(groups + count, splat16(c * 16) + load16(kLane),
                            less_or_equal(distance, most));
    }
    return count;
  }

  // Lists the leaves of the visited groups that may have a better code, and scans them.
  void visit() {
    for (int i = 0; i < num_visits; ++i) {
      const uint32_t visit = visits[i], group = visit / 16, lane = visit % 16;
      const Floats bound = splat16(best[lane]);
      const Floats distance = to_boxes(lane, {tree.leaves + group * box_floats()});
      unsigned leaves = less(distance, bound);
      leaves |= equal(distance, bound) & less(load16(tree.lowest + group * 16), splat16(id[lane]));
      const uint32_t own = home[lane] - group * 16;  // has been scanned
      leaves &= ~(own < 16 ? 1u << own : 0);
      num_pairs += store_packed(
          pairs + num_pairs,
          splat16(static_cast<int32_t>(group * 256 + lane)) + load16(kLeafOfPair), leaves);
      if (num_pairs > kPairs - 16) scan_pairs();
    }
    num_visits = 0;
    scan_pairs();
  }

  // Scans the nearest leaf of the nearest group, for queries whose home leaf is far away.
  void scan_nearest_leaf(int lane) {
    float near = kInfinity;
    int group = 0;
    for (int c = 0; c < tree.num_clusters; ++c) {
      const Floats distance = to_boxes(lane, {tree.groups + c * box_floats()});
      const float low = reduce_min(distance);
      if (low < near) near = low, group = c * 16 + __builtin_ctz(equal(distance, splat16(low)));
    }
    const Floats distance = to_boxes(lane, {tree.leaves + group * box_floats()});
    scan_leaf(group * 16 + __builtin_ctz(equal(distance, splat16(reduce_min(distance)))), lane);
  }

  void start() {
    for (int lane = 0; lane < 16; ++lane) {
      const Floats distance = to_leaf(home[lane], lane);
      const float low = reduce_min(distance);
      const int32_t found = id_at(home[lane], distance, low);
      best[lane] = low;
      id[lane] = low < kInfinity ? found : 0;
      visits[lane] = home[lane] / 16 * 16 + lane;
    }
    num_visits = 16;
    visit();
  }

  // Returns false if it gave up because it had to scan too much of the tree.
  bool search(int64_t most_pairs) {
    start();
    float low[kMaxDim], high[kMaxDim];
    for (int d = 0; d < dim(); ++d) low[d] = reduce_min(query(d)), high[d] = reduce_max(query(d));
    Ints home_group = load16(home);
    for (IntVec& part : home_group.part) part >>= 4;
    bool lost = false;
    for (int c = 0; c < tree.num_clusters; c += kGroups / 16) {
      const int end = c + kGroups / 16 < tree.num_clusters ? c + kGroups / 16 : tree.num_clusters;
      int count = list_groups(c, end, low, high);
      if (!lost && 2 * count > (end - c) * 16) {
        for (int lane = 0; lane < 16; ++lane) scan_nearest_leaf(lane);
        lost = true;
        count = list_groups(c, end, low, high);
      }
      for (int i = 0; i < count; ++i) {
        const int group = groups[i];
        unsigned lanes = less_or_equal(
            to_box({tree.groups + group / 16 * box_floats()}, group % 16), load16(best));
        lanes &= ~equal(home_group, splat16(group));
        num_visits += store_packed(visits + num_visits, splat16(group * 16) + load16(kLane), lanes);
        if (num_visits > kVisits - 16) {
          visit();
          if (num_scanned > most_pairs) return false;
        }
      }
    }
    visit();
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
