// Attention backward. Scores are stored as [keys, query rows], as in the forward pass. The five
// GEMMs of a block of queries and a block of keys read operands that are packed once per block or
// written with p and ds in both layouts, so that none is transposed in the inner loop.
#include "cpu/attention/attention_dropout.h"
#include "cpu/attention/attention_pack.h"

namespace emu3::EMU3_LEVEL {
namespace {

constexpr int64_t kQueryRows = 4 * kNR, kKeys = 192;
constexpr int64_t kMaxPanels = 4 + kMaxHeadsPerKVHead / kNR;

void plan(AttentionCall& call) {
  call.query_block = max(1, kQueryRows / max(1, call.heads_per_kv()));
  call.key_block = kKeys;
}

// A packed block of queries: q and dout as B operands of scores and dp (panels) and of dk and dv
// (columns).
template <typename T>
struct PackedQueries {
  QueryInfo info;
  float *lse, *delta;                  // [rows]; delta times the scale
  uint32_t *q_panels, *dout_panels;    // [panels][words][kNR]
  uint32_t *q_columns, *dout_columns;  // [rows / kPerWord][columns]
  float* dq;                           // [panels][columns][kNR]
  uintptr_t end;

  PackedQueries(const Sizes<T>& sizes, const char* memory) {
    Arena arena(memory);
    info.take(arena, sizes.rows);
    arena.take(lse, sizes.rows);
    arena.take(delta, sizes.rows);
    arena.take(q_panels, sizes.panels * sizes.words * kNR);
    arena.take(dout_panels, sizes.panels * sizes.words * kNR);
    arena.take(q_columns, sizes.row_words() * sizes.columns);
    arena.take(dout_columns, sizes.row_words() * sizes.columns);
    arena.take(dq, sizes.panels * sizes.columns * kNR);
    end = arena.next;
  }
};

// A packed block of keys, its gradients, and the scores, p, dp and ds of a pair of blocks.
template <typename T>
struct Scratch {
  uint32_t* lines;         // a buffer for transposition
  uint32_t *k, *v;         // [keys][depth]
  uint32_t* k_transposed;  // [columns][keys / kPerWord]
  float *dk, *dv;          // [keys][columns]
  float *scores, *dp;      // [keys][kNR]
  uint32_t* ds_panel;      // [keys / kPerWord][kNR]
  uint32_t *p, *ds;        // [keys][rows / kPerWord]
  uintptr_t end;

  Scratch(const Sizes<T>& sizes, const char* memory) {
    Arena arena(memory);
    arena.take(lines, kLanes * max(sizes.words, sizes.columns));
    arena.take(k, sizes.keys * sizes.depth);
    arena.take(v, sizes.keys * sizes.depth);
    arena.take(k_transposed, sizes.columns * sizes.key_words());
    arena.take(dk, sizes.keys * sizes.columns);
    arena.take(dv, sizes.keys * sizes.columns);
    arena.take(scores, sizes.keys * kNR);
    arena.take(dp, sizes.keys * kNR);
    arena.take(ds_panel, sizes.key_words() * kNR);
    arena.take(p, sizes.keys * sizes.row_words());
    arena.take(ds, sizes.keys * sizes.row_words());
    end = arena.next;
  }
};

template <typename T>
void pack_block(const AttentionCall& call, int64_t sequence, int64_t block, char* memory) {
  const Sizes<T> sizes(call);
  const PackedQueries<T> packed(sizes, memory);
  const QueryRows<T> q(call, call.q, sequence, block), dout(call, call.dout, sequence, block);
  packed.info.fill(call, q, sizes.rows);
  for (int64_t r = 0; r < sizes.rows; ++r) {
    const int64_t head = q.batch * call.heads + q.head_of(r);
    const int64_t at = r < q.count ? head * call.queries + q.token(r) : -1;
    packed.lse[r] = at < 0 ? 0 : call.lse[at];
    packed.delta[r] = at < 0 ? 0 : call.delta[at] * call.scale;
  }
  alignas(64) uint32_t lines[kLanes * kMaxHeadDim];
  pack_panels(sizes, q, packed.q_panels, lines);
  pack_panels(sizes, dout, packed.dout_panels, lines);
  pack_columns(sizes, q, sizes.rows, packed.q_columns);
  pack_columns(sizes, dout, sizes.rows, packed.dout_columns);
}

// The values of one vector of query rows.
struct RowVectors {
  IntVec first, end;
  Vec lse, delta;
};

// One vector of rows: p and ds from the scores and dp.
template <typename T, bool kMasked, bool kDropout>
void softmax_bwd(const AttentionCall& call, const Scratch<T>& scratch, int64_t stride,
                 KeyRange range, const RowVectors& info, DropoutMask& mask, int64_t first_key,
                 int64_t panel, int64_t n) {
  typedef typename DotOf<T>::type Dot;
  const Vec scale = splat(call.scale);
  const auto pair_of = [&](int64_t key, Vec& p, Vec& ds) {
    p = exp(fma(load(scratch.scores + key * kNR + n), scale, -info.lse));
    if constexpr (kMasked) {
      const IntVec index = (int32_t)(first_key + key) - IntVec{};
      p = (info.first <= index) & (index < info.end) ? p : Vec{};
    }
    Vec dp = load(scratch.dp + key * kNR + n);
    Vec dropped = p;
    if constexpr (kDropout) {
      const Vec keep = mask.scale(key);
      dp *= keep, dropped *= keep;
    }
    ds = p * fma(dp, scale, -info.delta);
    p = dropped;
  };
  const int64_t column = (panel * kNR + n) / Dot::kPerWord;
  for (int64_t key = range.from; key < range.to; key += 2) {
    Pair p, ds;
    pair_of(key, p.a, ds.a);
    pair_of(key + 1, p.b, ds.b);
    const int64_t a = key * stride + column, b = a + stride;
    Dot::store_rows(scratch.p + a, scratch.p + b, p);
    Dot::store_both(scratch.ds_panel + key / Dot::kPerWord * kNR + n, kNR, scratch.ds + a,
                    scratch.ds + b, ds);
  }
}

// The scores, p, dp, ds and dq of a panel of query rows.
template <typename T>
void step_panel(const AttentionCall& call, const Sizes<T>& sizes, const Scratch<T>& scratch,
                const PackedQueries<T>& packed, KeyRange range, int64_t first_key, int64_t panel,
                bool overwrite) {
  typedef typename Sizes<T>::Dot Dot;
  const int64_t keys = range.to - range.from, at = panel * sizes.words * kNR;
  gemm_panel<Dot>(Operand{scratch.k, sizes.depth}.at(range.from, 0), keys,
                  {packed.q_panels + at, kNR}, sizes.depth,
                  Accumulator{scratch.scores, kNR}.at(range.from, 0), true);
  gemm_panel<Dot>(Operand{scratch.v, sizes.depth}.at(range.from, 0), keys,
                  {packed.dout_panels + at, kNR}, sizes.depth,
                  Accumulator{scratch.dp, kNR}.at(range.from, 0), true);
  const bool drops = call.dropout.drop_below != 0;
  const auto update =
      drops ? (range.masked ? softmax_bwd<T, true, true> : softmax_bwd<T, false, true>)
            : (range.masked ? softmax_bwd<T, true, false> : softmax_bwd<T, false, false>);
  for (int64_t n = 0; n < kNR; n += kLanes) {
    const int64_t row = panel * kNR + n;
    const QueryInfo& query = packed.info;
    const RowVectors info{(IntVec)load_words((uint32_t*)query.first + row),
                          (IntVec)load_words((uint32_t*)query.end + row), load(packed.lse + row),
                          load(packed.delta + row)};
    DropoutMask mask{call.dropout, call.columns + (drops ? first_key : 0), call.keys - first_key,
                     load_words(query.position + row), load_words(query.head + row)};
    update(call, scratch, sizes.row_words(), range, info, mask, first_key, panel, n);
  }
  const Operand a{scratch.k_transposed + range.from / Dot::kPerWord, sizes.key_words()};
  const Operand b{scratch.ds_panel + range.from / Dot::kPerWord * kNR, kNR};
  gemm_panel<Dot>(a, round_up(sizes.head_dim, kMR), b, keys / Dot::kPerWord,
                  {packed.dq + panel * sizes.columns * kNR, kNR}, overwrite);
}

// dk or dv += A B, kMRWide keys at a time, over the panels of query rows that attend to them.
template <typename T>
void add_to_keys(const Sizes<T>& sizes, const KeyRange* ranges, const uint32_t* a_words,
                 const uint32_t* b_words, float* acc) {
  typedef typename Sizes<T>::Dot Dot;
  const int64_t panel_words = kNR / Dot::kPerWord;
  for (int64_t column = 0; column < sizes.columns; column += kNRWide * kLanes)
    for (int64_t key = 0; key < sizes.keys; key += kMRWide) {
      int64_t panel = 0, end = sizes.panels;
      while (panel < end && (key < ranges[panel].from || key >= ranges[panel].to)) ++panel;
      while (panel < end && (key < ranges[end - 1].from || key >= ranges[end - 1].to)) --end;
      if (panel == end) continue;
      const Operand a{a_words + key * sizes.row_words() + panel * panel_words, sizes.row_words()};
      const Operand b{b_words + panel * panel_words * sizes.columns + column, sizes.columns};
      gemm_wide<Dot>(a, b, (end - panel) * panel_words,
                     {acc + key * sizes.columns + column, sizes.columns},
                     min(sizes.columns - column, kNRWide * kLanes) / kLanes);
    }
}

template <typename T>
void step_block(const AttentionCall& call, int64_t sequence, int64_t key_block, int64_t query_block,
                char* packed_memory, char* memory) {
  const Sizes<T> sizes(call);
  const PackedQueries<T> packed(sizes, packed_memory);
  const Scratch<T> scratch(sizes, memory);
  const int64_t first_key = key_block * sizes.keys;
  const int64_t keys = min(sizes.keys, call.keys - first_key);
  const bool overwrite = call.key_blocks_of(sequence, query_block).first == key_block;
  const TileUse tiles;
  KeyRange ranges[kMaxPanels];
  for (int64_t panel = 0; panel < sizes.panels; ++panel) {
    ranges[panel] = KeyRange(packed.info, panel, first_key, keys);
    if (ranges[panel].from < ranges[panel].to) {
      step_panel(call, sizes, scratch, packed, ranges[panel], first_key, panel, overwrite);
    } else if (overwrite) {
      float* const dq = packed.dq + panel * sizes.columns * kNR;
      __builtin_memset(dq, 0, sizes.columns * kNR * sizeof *dq);
    }
  }
  add_to_keys(sizes, ranges, scratch.p, packed.dout_columns, scratch.dv);
  add_to_keys(sizes, ranges, scratch.ds, packed.q_columns, scratch.dk);
}

template <typename T>
void begin_block(const AttentionCall& call, int64_t sequence, int64_t block, char* memory) {
  const Sizes<T> sizes(call);
  const Scratch<T> scratch(sizes, memory);
  const KeyRows<T> k(call, call.k, sequence, block), v(call, call.v, sequence, block);
  const int64_t count = round_up(k.count, kMAlign);
  pack_rows(sizes, k, count, scratch.k, scratch.lines);
  pack_rows(sizes, v, count, scratch.v, scratch.lines);
  pack_transposed(sizes, k, scratch.k_transposed, scratch.lines);
  __builtin_memset(scratch.dk, 0, sizes.keys * sizes.columns * sizeof(float));
  __builtin_memset(scratch.dv, 0, sizes.keys * sizes.columns * sizeof(float));
}

template <typename T>
void end_block(const AttentionCall& call, int64_t sequence, int64_t block, char* memory) {
  const Sizes<T> sizes(call);
  const Scratch<T> scratch(sizes, memory);
  const KeyRows<T> keys(call, call.k, sequence, block);
  for (int64_t r = 0; r < keys.count; ++r) {
    const int64_t token = keys.first + r, at = r * sizes.columns;
    write_row(call.dk, keys.batch, token, keys.kv_head, scratch.dk + at, call.head_dim);
    write_row(call.dv, keys.batch, token, keys.kv_head, scratch.dv + at, call.head_dim);
  }
}

template <typename T>
void write_block(const AttentionCall& call, int64_t sequence, int64_t block, const char* memory) {
  const Sizes<T> sizes(call);
  const PackedQueries<T> packed(sizes, memory);
  const QueryRows<T> rows(call, call.q, sequence, block);
  const KeyBlocks attended = call.key_blocks_of(sequence, block);
  alignas(64) uint32_t lines[kLanes * kMaxHeadDim] = {};
  for (int64_t row = 0; row < rows.count; row += kLanes) {
    const float* const dq = packed.dq + row / kNR * kNR * sizes.columns + row % kNR;
    for (int64_t c = 0; attended.first < attended.end && c < sizes.columns; c += kLanes)
      transpose((const uint32_t*)dq + c * kNR, kNR, lines + c, sizes.columns);
    for (int64_t i = row; i < min(row + kLanes, rows.count); ++i)
      write_row(call.dq, rows.batch, rows.token(i), rows.head_of(i),
                (const float*)lines + (i - row) * sizes.columns, call.head_dim);
  }
}

int64_t packed_size(const AttentionCall& call) {
  int64_t size = 0;
  with_type(call.q.dtype, [&](auto type) {
    size = PackedQueries<decltype(type)>(Sizes<decltype(type)>(call), nullptr).end;
  });
  return size;
}

int64_t scratch_size(const AttentionCall& call) {
  int64_t size = 0;
  with_type(call.q.dtype, [&](auto type) {
    size = Scratch<decltype(type)>(Sizes<decltype(type)>(call), nullptr).end;
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
