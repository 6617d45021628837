// Attention forward with an online softmax. Scores are stored as [keys, query rows], one query to a
// lane: the softmax needs no reduction across lanes, and p already has the layout of a B operand.
#include "cpu/attention/attention_dropout.h"
#include "cpu/attention/attention_pack.h"

namespace emu3::EMU3_LEVEL {
namespace {

// The scores and probabilities of a panel and the packed keys of a block fit a 1 MB L2 cache.
constexpr int64_t kQueryRows = 4 * kNR, kKeys = 192;
// m_i before the first key; finite, so that the difference of two is not NaN.
constexpr float kNegInf = -1e38f;

void plan(AttentionCall& call) {
  call.query_block = max(1, kQueryRows / max(1, call.heads_per_kv()));
  call.key_block = kKeys;
}

template <typename T>
struct PackedKeys {
  uint32_t *keys, *values;  // [keys][depth], [columns][keys / kPerWord]
  uintptr_t end;

  PackedKeys(const Sizes<T>& sizes, const char* memory) {
    Arena arena(memory);
    arena.take(keys, sizes.keys * sizes.depth);
    arena.take(values, sizes.columns * sizes.key_words());
    end = arena.next;
  }
};

template <typename T>
struct Scratch {
  QueryInfo info;
  uint32_t* lines;      // a buffer for transposition
  uint32_t* queries;    // [panels][words][kNR]
  float *scores, *acc;  // [keys][kNR], [panels][columns][kNR]
  uint32_t* p;          // [keys / kPerWord][kNR]
  float *m_i, *l_i;     // [rows]
  uintptr_t end;

  Scratch(const Sizes<T>& sizes, const char* memory) {
    Arena arena(memory);
    info.take(arena, sizes.rows);
    arena.take(lines, kLanes * max(sizes.words, sizes.columns));
    arena.take(queries, sizes.panels * sizes.words * kNR);
    arena.take(scores, sizes.keys * kNR);
    arena.take(acc, sizes.panels * sizes.columns * kNR);
    arena.take(p, sizes.key_words() * kNR);
    arena.take(m_i, sizes.rows);
    arena.take(l_i, sizes.rows);
    end = arena.next;
  }
};

// The online softmax of one vector of rows: updates m_i and l_i, and writes p. Returns alpha, by
// which the accumulated output must be multiplied.
template <typename Dot, bool kMasked, bool kDropout>
Vec softmax(const float* scores, KeyRange range, IntVec first, IntVec end, Vec scale, float* m_i,
            float* l_i, DropoutMask& mask, int64_t first_key, uint32_t* p) {
  const auto attends = [&](int64_t key) {
    const IntVec index = (int32_t)(first_key + key) - IntVec{};
    return (first <= index) & (index < end);
  };
  const Vec m_old = load(m_i);
  Vec m_new = m_old;
  for (int64_t key = range.from; key < range.to; ++key) {
    const Vec x = load(scores + key * kNR) * scale;
    if constexpr (kMasked) {
      m_new = attends(key) ? max(m_new, x) : m_new;
    } else {
      m_new = max(m_new, x);
    }
  }
  const auto p_of = [&](int64_t key) {
    const Vec x = exp(load(scores + key * kNR) * scale - m_new);  // as m_new was rounded
    if constexpr (kMasked) return attends(key) ? x : Vec{};
    return x;
  };
  Vec sum{};
  for (int64_t key = range.from; key < range.to; key += 2) {
    Pair x{p_of(key), p_of(key + 1)};
    sum += x.a + x.b;
    if constexpr (kDropout) x.a *= mask.scale(key), x.b *= mask.scale(key + 1);
    Dot::store_column(p + key / Dot::kPerWord * kNR, kNR, x);
  }
  const Vec alpha = exp(m_old - m_new);
  store(m_i, m_new);
  store(l_i, fma(load(l_i), alpha, sum));
  return alpha;
}

template <typename T>
void attend_panel(const AttentionCall& call, const Sizes<T>& sizes, const Scratch<T>& scratch,
                  const PackedKeys<T>& packed, int64_t first_key, int64_t panel) {
  typedef typename Sizes<T>::Dot Dot;
  const int64_t keys = min(sizes.keys, call.keys - first_key);
  const KeyRange range(scratch.info, panel, first_key, keys);
  if (range.from >= range.to) return;
  const Operand queries{scratch.queries + panel * sizes.words * kNR, kNR};
  const Operand a{packed.keys, sizes.depth};
  gemm_panel<Dot>(a.at(range.from, 0), range.to - range.from, queries, sizes.depth,
                  Accumulator{scratch.scores, kNR}.at(range.from, 0), true);
  const Accumulator acc{scratch.acc + panel * sizes.columns * kNR, kNR};
  const bool drops = call.dropout.drop_below != 0;
  const auto update = drops
                          ? (range.masked ? softmax<Dot, true, true> : softmax<Dot, false, true>)
                          : (range.masked ? softmax<Dot, true, false> : softmax<Dot, false, false>);
  for (int64_t n = 0; n < kNR; n += kLanes) {
    const int64_t row = panel * kNR + n;
    const QueryInfo& info = scratch.info;
    DropoutMask mask{call.dropout, call.columns + (drops ? first_key : 0), call.keys - first_key,
                     load_words(info.position + row), load_words(info.head + row)};
    const Vec alpha =
        update(scratch.scores + n, range, (IntVec)load_words((uint32_t*)info.first + row),
               (IntVec)load_words((uint32_t*)info.end + row), splat(call.scale), scratch.m_i + row,
               scratch.l_i + row, mask, first_key, scratch.p + n);
    if (reduce_max(1.0f - alpha) > 0)
      for (int64_t c = 0; c < sizes.head_dim; ++c) {
        float* const sum = acc.data + c * kNR + n;
        store(sum, load(sum) * alpha);
      }
  }
  const Operand values{packed.values, sizes.key_words()};
  const Operand p{scratch.p, kNR};
  gemm_panel<Dot>(values.at(0, range.from / Dot::kPerWord), round_up(sizes.head_dim, kMR),
                  p.at(range.from / Dot::kPerWord, 0), (range.to - range.from) / Dot::kPerWord, acc,
                  false);
}

template <typename T>
void write(const AttentionCall& call, const Sizes<T>& sizes, const Scratch<T>& scratch,
           const QueryRows<T>& rows) {
  auto* const lines = (float*)scratch.lines;
  for (int64_t row = 0; row < rows.count; row += kLanes) {
    const Vec l_i = load(scratch.l_i + row);
    const Vec inverse = l_i == 0 ? Vec{} : 1.0f / l_i;
    float* const acc = scratch.acc + row / kNR * kNR * sizes.columns + row % kNR;
    for (int64_t c = 0; c < sizes.columns; ++c) store(acc + c * kNR, load(acc + c * kNR) * inverse);
    for (int64_t c = 0; c < sizes.columns; c += kLanes)
      transpose((uint32_t*)acc + c * kNR, kNR, (uint32_t*)lines + c, sizes.columns);
    for (int64_t i = row; i < min(row + kLanes, rows.count); ++i) {
      const int64_t head = rows.head_of(i), token = rows.token(i);
      write_row(call.out, rows.batch, token, head, lines + (i - row) * sizes.columns,
                call.head_dim);
      call.lse[(rows.batch * call.heads + head) * call.queries + token] =
          scratch.m_i[i] + __builtin_logf(scratch.l_i[i]);
    }
  }
}

template <typename T>
void attend_block(const AttentionCall& call, int64_t sequence, int64_t block, const char* packed,
                  char* memory) {
  const Sizes<T> sizes(call);
  const Scratch<T> scratch(sizes, memory);
  const QueryRows<T> rows(call, call.q, sequence, block);
  const TileUse tiles;
  scratch.info.fill(call, rows, sizes.rows);
  pack_panels(sizes, rows, scratch.queries, scratch.lines);
  __builtin_memset(scratch.acc, 0, sizes.rows * sizes.columns * sizeof(float));
  for (int64_t r = 0; r < sizes.rows; ++r) scratch.m_i[r] = kNegInf, scratch.l_i[r] = 0;
  const int64_t block_size = PackedKeys<T>(sizes, nullptr).end;
  const KeyBlocks attended = call.key_blocks_of(sequence, block);
  for (int64_t b = attended.first; b < attended.end; ++b) {
    const PackedKeys<T> keys(sizes, packed + b * block_size);
    for (int64_t panel = 0; panel < sizes.panels; ++panel)
      attend_panel(call, sizes, scratch, keys, b * sizes.keys, panel);
  }
  write(call, sizes, scratch, rows);
}

template <typename T>
void pack_block(const AttentionCall& call, int64_t sequence, int64_t block, char* memory) {
  const Sizes<T> sizes(call);
  const PackedKeys<T> packed(sizes, memory);
  const KeyRows<T> keys(call, call.k, sequence, block), values(call, call.v, sequence, block);
  const int64_t count = round_up(keys.count, kMAlign);
  alignas(64) uint32_t lines[kLanes * kMaxHeadDim];
  pack_rows(sizes, keys, count, packed.keys, lines);
  pack_transposed(sizes, values, packed.values, lines);
}

int64_t packed_size(const AttentionCall& call) {
  int64_t size = 0;
  with_type(call.q.dtype, [&](auto type) {
    size = PackedKeys<decltype(type)>(Sizes<decltype(type)>(call), nullptr).end;
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

void attend(const AttentionCall& call, int64_t sequence, int64_t block, const char* packed,
            char* scratch) {
  with_type(call.q.dtype, [&](auto type) {
    attend_block<decltype(type)>(call, sequence, block, packed, scratch);
  });
}

}  // namespace

extern const Attention attention{plan, packed_size, scratch_size, pack, attend};

}  // namespace emu3::EMU3_LEVEL
