// Attention forward. Scores of a panel of query rows are kept one query to a lane, keys below each
// other: the softmax needs no sum across lanes, and its probabilities are a right factor at once.
#include "cpu/attention/attention_dropout.h"
#include "cpu/attention/attention_pack.h"

namespace emu3::EMU3_LEVEL {
namespace {

// A panel's scores and probabilities and its share of the packed keys stay in a 1 MB L2 cache.
constexpr int64_t kQueryRows = 4 * kPanel, kKeys = 192;
// In place of a highest score that is not there: e^-kNone is 0 to any score.
constexpr float kNone = -1e38f;

void plan(AttentionCall& call) {
  call.query_block = most(1, kQueryRows / most(1, call.shared()));
  call.key_block = kKeys;
}

template <typename T>
struct PackedKeys {
  uint32_t *keys, *values;  // [keys][depth], [columns][keys / kPer]
  uintptr_t end;

  PackedKeys(const Extents<T>& extents, const char* memory) {
    Pieces pieces(memory);
    pieces.take(keys, extents.keys * extents.depth);
    pieces.take(values, extents.columns * extents.key_words());
    end = pieces.next;
  }
};

template <typename T>
struct Scratch {
  QueryLanes lanes;
  uint32_t* lines;                  // before they are transposed
  uint32_t* queries;                // [panels][words][kPanel]
  float *scores, *sums;             // [keys][kPanel], [panels][columns][kPanel]
  uint32_t* weights;                // [keys / kPer][kPanel]
  float *highest, *total, *result;  // [rows], [rows], one row
  uintptr_t end;

  Scratch(const Extents<T>& extents, const char* memory) {
    Pieces pieces(memory);
    lanes.take(pieces, extents.rows);
    pieces.take(lines, kLanes * most(extents.words, extents.columns));
    pieces.take(queries, extents.panels * extents.words * kPanel);
    pieces.take(scores, extents.keys * kPanel);
    pieces.take(sums, extents.panels * extents.columns * kPanel);
    pieces.take(weights, extents.key_words() * kPanel);
    pieces.take(highest, extents.rows);
    pieces.take(total, extents.rows);
    end = pieces.next;
  }
};

// One vector of rows: raises its highest score, adds to its total, turns scores into weights.
// Returns what the sums so far are to be multiplied by.
template <typename Word, bool kHidden, bool kDropout>
Vec softmax(const float* scores, Seen seen, IntVec first, IntVec end, Vec scale, float* highest,
            float* total, Kept& kept, int64_t first_key, uint32_t* weights) {
  const auto visible = [&](int64_t key) {
    const IntVec place = (int32_t)(first_key + key) - IntVec{};
    return (first <= place) & (place < end);
  };
  const Vec before = load(highest);
  Vec top = before;
  for (int64_t key = seen.from; key < seen.to; ++key) {
    const Vec x = load(scores + key * kPanel) * scale;
    if constexpr (kHidden) {
      top = visible(key) ? max(top, x) : top;
    } else {
      top = max(top, x);
    }
  }
  const auto weight = [&](int64_t key) {
    const Vec x = exp(load(scores + key * kPanel) * scale - top);  // as top was rounded
    if constexpr (kHidden) return visible(key) ? x : Vec{};
    return x;
  };
  Vec sum{};
  for (int64_t key = seen.from; key < seen.to; key += 2) {
    Pair x{weight(key), weight(key + 1)};
    sum += x.a + x.b;
    if constexpr (kDropout) x.a *= kept.factor(key), x.b *= kept.factor(key + 1);
    Word::store_column(weights + key / Word::kPer * kPanel, kPanel, x);
  }
  const Vec factor = exp(before - top);
  store(highest, top);
  store(total, fma(load(total), factor, sum));
  return factor;
}

template <typename T>
void attend_panel(const AttentionCall& call, const Extents<T>& extents, const Scratch<T>& scratch,
                  const PackedKeys<T>& packed, int64_t first_key, int64_t panel) {
  typedef typename Extents<T>::Word Word;
  const int64_t keys = least(extents.keys, call.keys - first_key);
  const Seen seen(scratch.lanes, panel, first_key, keys);
  if (seen.from >= seen.to) return;
  const Words queries{scratch.queries + panel * extents.words * kPanel, kPanel};
  const Words left{packed.keys, extents.depth};
  multiply_panel<Word>(left.at(seen.from, 0), seen.to - seen.from, queries, extents.depth,
                       Sums{scratch.scores, kPanel}.at(seen.from, 0), true);
  const Sums sums{scratch.sums + panel * extents.columns * kPanel, kPanel};
  const bool drops = call.dropout.drop_below != 0;
  const auto turn = drops
                        ? (seen.hidden ? softmax<Word, true, true> : softmax<Word, false, true>)
                        : (seen.hidden ? softmax<Word, true, false> : softmax<Word, false, false>);
  for (int64_t n = 0; n < kPanel; n += kLanes) {
    const int64_t row = panel * kPanel + n;
    const QueryLanes& lanes = scratch.lanes;
    Kept kept{call.dropout, call.columns + (drops ? first_key : 0), call.keys - first_key,
              load_words(lanes.position + row), load_words(lanes.head + row)};
    const Vec factor =
        turn(scratch.scores + n, seen, (IntVec)load_words((uint32_t*)lanes.first + row),
             (IntVec)load_words((uint32_t*)lanes.end + row), splat(call.scale),
             scratch.highest + row, scratch.total + row, kept, first_key, scratch.weights + n);
    if (reduce_max(1.0f - factor) > 0)
      for (int64_t c = 0; c < extents.width; ++c) {
        float* const sum = sums.data + c * kPanel + n;
        store(sum, load(sum) * factor);
      }
  }
  const Words values{packed.values, extents.key_words()};
  const Words weights{scratch.weights, kPanel};
  multiply_panel<Word>(values.at(0, seen.from / Word::kPer), round_up(extents.width, kTall),
                       weights.at(seen.from / Word::kPer, 0), (seen.to - seen.from) / Word::kPer,
                       sums, false);
}

template <typename T>
void write(const AttentionCall& call, const Extents<T>& extents, const Scratch<T>& scratch,
           const QueryRows<T>& rows) {
  auto* const lines = (float*)scratch.lines;
  for (int64_t row = 0; row < rows.count; row += kLanes) {
    const Vec total = load(scratch.total + row);
    const Vec inverse = total == 0 ? Vec{} : 1.0f / total;
    float* const sums = scratch.sums + row / kPanel * kPanel * extents.columns + row % kPanel;
    for (int64_t c = 0; c < extents.columns; ++c)
      store(sums + c * kPanel, load(sums + c * kPanel) * inverse);
    for (int64_t c = 0; c < extents.columns; c += kLanes)
      transpose((uint32_t*)sums + c * kPanel, kPanel, (uint32_t*)lines + c, extents.columns);
    for (int64_t i = row; i < least(row + kLanes, rows.count); ++i) {
      const int64_t head = rows.head_of(i), token = rows.token(i);
      write_row(call.out, rows.batch, token, head, lines + (i - row) * extents.columns, call.width);
      call.lse[(rows.batch * call.heads + head) * call.queries + token] =
          scratch.highest[i] + __builtin_logf(scratch.total[i]);
    }
  }
}

template <typename T>
void attend_block(const AttentionCall& call, int64_t sequence, int64_t block, const char* packed,
                  char* memory) {
  const Extents<T> extents(call);
  const Scratch<T> scratch(extents, memory);
  const QueryRows<T> rows(call, call.q, sequence, block);
  const TileUse tiles;
  scratch.lanes.fill(call, rows, extents.rows);
  pack_panels(extents, rows, scratch.queries, scratch.lines);
  __builtin_memset(scratch.sums, 0, extents.rows * extents.columns * sizeof(float));
  for (int64_t r = 0; r < extents.rows; ++r) scratch.highest[r] = kNone, scratch.total[r] = 0;
  const int64_t block_size = PackedKeys<T>(extents, nullptr).end;
  const KeyBlocks met = call.met(sequence, block);
  for (int64_t b = met.first; b < met.end; ++b) {
    const PackedKeys<T> keys(extents, packed + b * block_size);
    for (int64_t panel = 0; panel < extents.panels; ++panel)
      attend_panel(call, extents, scratch, keys, b * extents.keys, panel);
  }
  write(call, extents, scratch, rows);
}

template <typename T>
void pack_block(const AttentionCall& call, int64_t sequence, int64_t block, char* memory) {
  const Extents<T> extents(call);
  const PackedKeys<T> packed(extents, memory);
  const KeyRows<T> keys(call, call.k, sequence, block), values(call, call.v, sequence, block);
  const int64_t count = round_up(keys.count, kStep);
  alignas(64) uint32_t lines[kLanes * kMostWidth];
  pack_rows(extents, keys, count, packed.keys, lines);
  pack_transposed(extents, values, packed.values, lines);
}

int64_t packed_size(const AttentionCall& call) {
  int64_t size = 0;
  with_type(call.q.dtype, [&](auto type) {
    size = PackedKeys<decltype(type)>(Extents<decltype(type)>(call), nullptr).end;
  });
  return size;
}

int64_t scratch_size(const AttentionCall& call) {
  int64_t size = 0;
  with_type(call.q.dtype, [&](auto type) {
    size = Scratch<decltype(type)>(Extents<decltype(type)>(call), nullptr).end;
  });
  return size;
}

void pack(const AttentionCall& call, int64_t sequence, int64_t block, char* packed) {
  with_type(call.q.dtype,
            [&](auto type) { pack_block<decltype(type)>(call, sequence, block, packed); });
}

void attend(const AttentionCall& call, int64_t sequence, int64_t block, const char* packed,
            char* scratch) {
  with_type(call.q.dtype, [&](auto type) {
    attend_block<decltype(type)>(call, sequence, block, packed, scratch);
  });
}

}  // namespace

extern const Attention attention{plan, packed_size, scratch_size, pack, attend};

}  // namespace emu3::EMU3_LEVEL
