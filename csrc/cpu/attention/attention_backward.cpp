// Attention backward. As in the forward pass, a panel keeps one query row to a lane and keys below
// each other; all five products of two blocks are then taken from forms packed once, or made with
// the probabilities: nothing is transposed on the way.
#include "cpu/attention/attention_dropout.h"
#include "cpu/attention/attention_pack.h"

namespace emu3::EMU3_LEVEL {
namespace {

constexpr int64_t kQueryRows = 4 * kPanel, kKeys = 192;
constexpr int64_t kMostPanels = 4 + kMostShared / kPanel;

void plan(AttentionCall& call) {
  call.query_block = most(1, kQueryRows / most(1, call.shared()));
  call.key_block = kKeys;
}

// A block of queries: q and dout as right factors of scores (panels) and of dk and dv (columns).
template <typename T>
struct PackedQueries {
  QueryLanes lanes;
  float *lse, *delta;                  // [rows]; delta times the scale
  uint32_t *q_panels, *dout_panels;    // [panels][words][kPanel]
  uint32_t *q_columns, *dout_columns;  // [rows / kPer][columns]
  float* dq;                           // [panels][columns][kPanel]
  uintptr_t end;

  PackedQueries(const Extents<T>& extents, const char* memory) {
    Pieces pieces(memory);
    lanes.take(pieces, extents.rows);
    pieces.take(lse, extents.rows);
    pieces.take(delta, extents.rows);
    pieces.take(q_panels, extents.panels * extents.words * kPanel);
    pieces.take(dout_panels, extents.panels * extents.words * kPanel);
    pieces.take(q_columns, extents.row_words() * extents.columns);
    pieces.take(dout_columns, extents.row_words() * extents.columns);
    pieces.take(dq, extents.panels * extents.columns * kPanel);
    end = pieces.next;
  }
};

// A block of keys, its gradients, and what it and a block of queries have between them.
template <typename T>
struct Scratch {
  uint32_t* lines;              // before they are transposed
  uint32_t *k, *v;              // [keys][depth]
  uint32_t* k_transposed;       // [columns][keys / kPer]
  float *dk, *dv;               // [keys][columns]
  float *scores, *dweights;     // [keys][kPanel]
  uint32_t* dscores_panel;      // [keys / kPer][kPanel]
  uint32_t *weights, *dscores;  // [keys][rows / kPer]
  uintptr_t end;

  Scratch(const Extents<T>& extents, const char* memory) {
    Pieces pieces(memory);
    pieces.take(lines, kLanes * most(extents.words, extents.columns));
    pieces.take(k, extents.keys * extents.depth);
    pieces.take(v, extents.keys * extents.depth);
    pieces.take(k_transposed, extents.columns * extents.key_words());
    pieces.take(dk, extents.keys * extents.columns);
    pieces.take(dv, extents.keys * extents.columns);
    pieces.take(scores, extents.keys * kPanel);
    pieces.take(dweights, extents.keys * kPanel);
    pieces.take(dscores_panel, extents.key_words() * kPanel);
    pieces.take(weights, extents.keys * extents.row_words());
    pieces.take(dscores, extents.keys * extents.row_words());
    end = pieces.next;
  }
};

template <typename T>
void pack_block(const AttentionCall& call, int64_t sequence, int64_t block, char* memory) {
  const Extents<T> extents(call);
  const PackedQueries<T> packed(extents, memory);
  const QueryRows<T> q(call, call.q, sequence, block), dout(call, call.dout, sequence, block);
  packed.lanes.fill(call, q, extents.rows);
  for (int64_t r = 0; r < extents.rows; ++r) {
    const int64_t head = q.batch * call.heads + q.head_of(r);
    const int64_t at = r < q.count ? head * call.queries + q.token(r) : -1;
    packed.lse[r] = at < 0 ? 0 : call.lse[at];
    packed.delta[r] = at < 0 ? 0 : call.delta[at] * call.scale;
  }
  alignas(64) uint32_t lines[kLanes * kMostWidth];
  pack_panels(extents, q, packed.q_panels, lines);
  pack_panels(extents, dout, packed.dout_panels, lines);
  pack_columns(extents, q, extents.rows, packed.q_columns);
  pack_columns(extents, dout, extents.rows, packed.dout_columns);
}

// What a vector of rows takes from a block of queries.
struct Lanes {
  IntVec first, end;
  Vec lse, delta;
};

// One vector of rows: weights and the gradients of scores, from scores and gradients of weights.
template <typename T, bool kHidden, bool kDropout>
void differentiate(const AttentionCall& call, const Scratch<T>& scratch, int64_t stride, Seen seen,
                   const Lanes& lanes, Kept& kept, int64_t first_key, int64_t panel, int64_t n) {
  typedef typename WordsOf<T>::type Word;
  const Vec scale = splat(call.scale);
  const auto pair_of = [&](int64_t key, Vec& weight, Vec& dscore) {
    weight = exp(fma(load(scratch.scores + key * kPanel + n), scale, -lanes.lse));
    if constexpr (kHidden) {
      const IntVec place = (int32_t)(first_key + key) - IntVec{};
      weight = (lanes.first <= place) & (place < lanes.end) ? weight : Vec{};
    }
    Vec dweight = load(scratch.dweights + key * kPanel + n);
    Vec dropped = weight;
    if constexpr (kDropout) {
      const Vec factor = kept.factor(key);
      dweight *= factor, dropped *= factor;
    }
    dscore = weight * fma(dweight, scale, -lanes.delta);
    weight = dropped;
  };
  const int64_t column = (panel * kPanel + n) / Word::kPer;
  for (int64_t key = seen.from; key < seen.to; key += 2) {
    Pair weight, dscore;
    pair_of(key, weight.a, dscore.a);
    pair_of(key + 1, weight.b, dscore.b);
    const int64_t a = key * stride + column, b = a + stride;
    Word::store_rows(scratch.weights + a, scratch.weights + b, weight);
    Word::store_both(scratch.dscores_panel + key / Word::kPer * kPanel + n, kPanel,
                     scratch.dscores + a, scratch.dscores + b, dscore);
  }
}

// Everything of a panel but its share of dk and dv.
template <typename T>
void step_panel(const AttentionCall& call, const Extents<T>& extents, const Scratch<T>& scratch,
                const PackedQueries<T>& packed, Seen seen, int64_t first_key, int64_t panel,
                bool from_zero) {
  typedef typename Extents<T>::Word Word;
  const int64_t keys = seen.to - seen.from, at = panel * extents.words * kPanel;
  multiply_panel<Word>(Words{scratch.k, extents.depth}.at(seen.from, 0), keys,
                       {packed.q_panels + at, kPanel}, extents.depth,
                       Sums{scratch.scores, kPanel}.at(seen.from, 0), true);
  multiply_panel<Word>(Words{scratch.v, extents.depth}.at(seen.from, 0), keys,
                       {packed.dout_panels + at, kPanel}, extents.depth,
                       Sums{scratch.dweights, kPanel}.at(seen.from, 0), true);
  const bool drops = call.dropout.drop_below != 0;
  const auto turn =
      drops ? (seen.hidden ? differentiate<T, true, true> : differentiate<T, false, true>)
            : (seen.hidden ? differentiate<T, true, false> : differentiate<T, false, false>);
  for (int64_t n = 0; n < kPanel; n += kLanes) {
    const int64_t row = panel * kPanel + n;
    const QueryLanes& places = packed.lanes;
    const Lanes lanes{(IntVec)load_words((uint32_t*)places.first + row),
                      (IntVec)load_words((uint32_t*)places.end + row), load(packed.lse + row),
                      load(packed.delta + row)};
    Kept kept{call.dropout, call.columns + (drops ? first_key : 0), call.keys - first_key,
              load_words(places.position + row), load_words(places.head + row)};
    turn(call, scratch, extents.row_words(), seen, lanes, kept, first_key, panel, n);
  }
  const Words left{scratch.k_transposed + seen.from / Word::kPer, extents.key_words()};
  const Words right{scratch.dscores_panel + seen.from / Word::kPer * kPanel, kPanel};
  multiply_panel<Word>(left, round_up(extents.width, kTall), right, keys / Word::kPer,
                       {packed.dq + panel * extents.columns * kPanel, kPanel}, from_zero);
}

// c += a b: kFlat keys at a time, of each the panels between them that see it.
template <typename T>
void add_to_keys(const Extents<T>& extents, const Seen* seen, const uint32_t* left,
                 const uint32_t* right, float* sums) {
  typedef typename Extents<T>::Word Word;
  const int64_t panel_words = kPanel / Word::kPer;
  for (int64_t column = 0; column < extents.columns; column += kWide * kLanes)
    for (int64_t key = 0; key < extents.keys; key += kFlat) {
      int64_t panel = 0, end = extents.panels;
      while (panel < end && (key < seen[panel].from || key >= seen[panel].to)) ++panel;
      while (panel < end && (key < seen[end - 1].from || key >= seen[end - 1].to)) --end;
      if (panel == end) continue;
      const Words a{left + key * extents.row_words() + panel * panel_words, extents.row_words()};
      const Words b{right + panel * panel_words * extents.columns + column, extents.columns};
      add_flat<Word>(a, b, (end - panel) * panel_words,
                     {sums + key * extents.columns + column, extents.columns},
                     least(extents.columns - column, kWide * kLanes) / kLanes);
    }
}

template <typename T>
void step_block(const AttentionCall& call, int64_t sequence, int64_t key_block, int64_t query_block,
                char* packed_memory, char* memory) {
  const Extents<T> extents(call);
  const PackedQueries<T> packed(extents, packed_memory);
  const Scratch<T> scratch(extents, memory);
  const int64_t first_key = key_block * extents.keys;
  const int64_t keys = least(extents.keys, call.keys - first_key);
  const bool from_zero = call.met(sequence, query_block).first == key_block;
  const TileUse tiles;
  Seen seen[kMostPanels];
  for (int64_t panel = 0; panel < extents.panels; ++panel) {
    seen[panel] = Seen(packed.lanes, panel, first_key, keys);
    if (seen[panel].from < seen[panel].to) {
      step_panel(call, extents, scratch, packed, seen[panel], first_key, panel, from_zero);
    } else if (from_zero) {
      float* const dq = packed.dq + panel * extents.columns * kPanel;
      __builtin_memset(dq, 0, extents.columns * kPanel * sizeof *dq);
    }
  }
  add_to_keys(extents, seen, scratch.weights, packed.dout_columns, scratch.dv);
  add_to_keys(extents, seen, scratch.dscores, packed.q_columns, scratch.dk);
}

template <typename T>
void begin_block(const AttentionCall& call, int64_t sequence, int64_t block, char* memory) {
  const Extents<T> extents(call);
  const Scratch<T> scratch(extents, memory);
  const KeyRows<T> k(call, call.k, sequence, block), v(call, call.v, sequence, block);
  const int64_t count = round_up(k.count, kStep);
  pack_rows(extents, k, count, scratch.k, scratch.lines);
  pack_rows(extents, v, count, scratch.v, scratch.lines);
  pack_transposed(extents, k, scratch.k_transposed, scratch.lines);
  __builtin_memset(scratch.dk, 0, extents.keys * extents.columns * sizeof(float));
  __builtin_memset(scratch.dv, 0, extents.keys * extents.columns * sizeof(float));
}

template <typename T>
void end_block(const AttentionCall& call, int64_t sequence, int64_t block, char* memory) {
  const Extents<T> extents(call);
  const Scratch<T> scratch(extents, memory);
  const KeyRows<T> keys(call, call.k, sequence, block);
  for (int64_t r = 0; r < keys.count; ++r) {
    const int64_t token = keys.first + r, at = r * extents.columns;
    write_row(call.dk, keys.batch, token, keys.group, scratch.dk + at, call.width);
    write_row(call.dv, keys.batch, token, keys.group, scratch.dv + at, call.width);
  }
}

template <typename T>
void write_block(const AttentionCall& call, int64_t sequence, int64_t block, const char* memory) {
  const Extents<T> extents(call);
  const PackedQueries<T> packed(extents, memory);
  const QueryRows<T> rows(call, call.q, sequence, block);
  const KeyBlocks met = call.met(sequence, block);
  alignas(64) uint32_t lines[kLanes * kMostWidth] = {};
  for (int64_t row = 0; row < rows.count; row += kLanes) {
    const float* const dq = packed.dq + row / kPanel * kPanel * extents.columns + row % kPanel;
    for (int64_t c = 0; met.first < met.end && c < extents.columns; c += kLanes)
      transpose((const uint32_t*)dq + c * kPanel, kPanel, lines + c, extents.columns);
    for (int64_t i = row; i < least(row + kLanes, rows.count); ++i)
      write_row(call.dq, rows.batch, rows.token(i), rows.head_of(i),
                (const float*)lines + (i - row) * extents.columns, call.width);
  }
}

int64_t packed_size(const AttentionCall& call) {
  int64_t size = 0;
  with_type(call.q.dtype, [&](auto type) {
    size = PackedQueries<decltype(type)>(Extents<decltype(type)>(call), nullptr).end;
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

void begin(const AttentionCall& call, int64_t sequence, int64_t block, char* scratch) {
  with_type(call.q.dtype,
            [&](auto type) { begin_block<decltype(type)>(call, sequence, block, scratch); });
}

void step(const AttentionCall& call, int64_t sequence, int64_t key_block, int64_t query_block,
          char* packed, char* scratch) {
  with_type(call.q.dtype, [&](auto type) {
    step_block<decltype(type)>(call, sequence, key_block, query_block, packed, scratch);
  });
}

void end(const AttentionCall& call, int64_t sequence, int64_t block, char* scratch) {
  with_type(call.q.dtype,
            [&](auto type) { end_block<decltype(type)>(call, sequence, block, scratch); });
}

void write(const AttentionCall& call, int64_t sequence, int64_t block, const char* packed) {
  with_type(call.q.dtype,
            [&](auto type) { write_block<decltype(type)>(call, sequence, block, packed); });
}

}  // namespace

extern const AttentionBackward attention_backward{plan,  packed_size, scratch_size, pack,
                                                  begin, step,        end,          write};

}  // namespace emu3::EMU3_LEVEL
