#include "cpu/attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "bindings/torch_stable.h"
#include "cpu/attention/decode_attention.h"

namespace emu3 {
namespace {

using torch::headeronly::ScalarType;

TokenHeads heads(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), dtype_of(x), x.stride(0), x.stride(1),
          x.stride(2)};
}

template <typename T>
const T* data(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Runs body(task, worker) for every task in order, a thread taking the next when it is free.
template <typename Body>
void run_tasks(int64_t tasks, int64_t workers, Body body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t end) {
    for (; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        body(task, worker);
  });
}

int64_t workers(int64_t tasks) {
  return std::min<int64_t>(tasks, torch::stable::get_num_threads());
}

// `count` buffers of `size` bytes, aligned to a cache line as all memory of torch is.
struct Memory {
  Tensor tensor;
  int64_t size;

  Memory(const Tensor& like, int64_t count, int64_t size)
      : tensor(empty(like, {count * size}, ScalarType::Byte)), size(size) {}

  char* operator[](int64_t i) const {
    return static_cast<char*>(tensor.mutable_data_ptr()) + i * size;
  }
};

// The arguments that forward and backward share; first and end are int32 [1 or B, T] with unit
// stride in T.
AttentionCall call_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& first,
                      const Tensor& end, double scale, double dropout_p,
                      const std::optional<Tensor>& seed, const std::optional<Tensor>& rows,
                      const std::optional<Tensor>& columns, int64_t first_head, int64_t all_heads) {
  AttentionCall call{};
  call.batch = q.size(0), call.queries = q.size(1), call.heads = q.size(2),
  call.head_dim = q.size(3);
  call.keys = k.size(1), call.kv_heads = k.size(2);
  STD_TORCH_CHECK(call.head_dim <= kMaxHeadDim && call.heads / call.kv_heads <= kMaxHeadsPerKVHead,
                  "attention: head_dim must be at most 256, and heads per KV head at most 1024");
  call.scale = static_cast<float>(scale);
  call.q = heads(q), call.k = heads(k), call.v = heads(v);
  call.first = static_cast<const int32_t*>(first.const_data_ptr());
  call.end = static_cast<const int32_t*>(end.const_data_ptr());
  call.range_stride = first.size(0) == 1 ? 0 : first.size(1);
  if (dropout_p > 0) {
    call.dropout.seed = *data<uint64_t>(seed);
    call.dropout.drop_below =
        static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 0x1p32), 4294967295.0));
    call.dropout.scale = static_cast<float>(1 / (1 - dropout_p));
    call.rows = data<int32_t>(rows), call.columns = data<int32_t>(columns);
    call.first_head = first_head, call.all_heads = all_heads;
  }
  return call;
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& first, const Tensor& end, double scale,
                                         double dropout_p, const std::optional<Tensor>& seed,
                                         const std::optional<Tensor>& rows,
                                         const std::optional<Tensor>& columns, int64_t first_head,
                                         int64_t all_heads, bool float32_out) {
  AttentionCall call =
      call_of(q, k, v, first, end, scale, dropout_p, seed, rows, columns, first_head, all_heads);
  const auto dtype = float32_out ? ScalarType::Float : q.scalar_type();
  Tensor out = empty(q, q.sizes(), dtype);
  Tensor lse = empty(q, {call.batch, call.heads, call.queries}, ScalarType::Float);
  call.out = heads(out);
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (lse.numel() == 0) return {out, lse};
  const Attention& kernels = attention();
  kernels.plan(call);
  const int64_t key_blocks = call.key_blocks(), sequences = call.sequences();
  const Memory packed(q, sequences * key_blocks, kernels.packed_size(call));
  run_tasks(sequences * key_blocks, workers(sequences * key_blocks), [&](int64_t task, int64_t) {
    kernels.pack(call, task / key_blocks, task % key_blocks, packed[task]);
  });
  // Causal queries attend to more keys the later they are: the longest tasks come first.
  const int64_t tasks = sequences * call.query_blocks();
  const Memory scratch(q, workers(tasks), kernels.scratch_size(call));
  run_tasks(tasks, workers(tasks), [&](int64_t task, int64_t worker) {
    const int64_t sequence = task % sequences;
    kernels.attend(call, sequence, call.query_blocks() - 1 - task / sequences,
                   packed[sequence * key_blocks], scratch[worker]);
  });
  return {out, lse};
}

// A ticket lock per block of queries: blocks of keys add to its dq one at a time, in ascending
// order. Tasks start in this order too, so a task that waits waits for one that runs.
struct Tickets {
  std::vector<std::atomic<int64_t>> next;

  explicit Tickets(int64_t count) : next(count) {}

  void wait_for(int64_t i, int64_t turn) {
    while (next[i].load(std::memory_order_acquire) != turn) std::this_thread::yield();
  }
  void set(int64_t i, int64_t turn) { next[i].store(turn, std::memory_order_release); }
};

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
    const Tensor& delta, const Tensor& first, const Tensor& end, double scale, double dropout_p,
    const std::optional<Tensor>& seed, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& columns, int64_t first_head, int64_t all_heads, bool float32_out) {
  AttentionCall call =
      call_of(q, k, v, first, end, scale, dropout_p, seed, rows, columns, first_head, all_heads);
  const auto dtype = float32_out ? ScalarType::Float : q.scalar_type();
  Tensor dq = empty(q, q.sizes(), dtype);
  Tensor dk = empty(k, k.sizes(), dtype);
  Tensor dv = empty(v, v.sizes(), dtype);
  call.dout = heads(dout), call.dq = heads(dq), call.dk = heads(dk), call.dv = heads(dv);
  call.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  call.delta = static_cast<const float*>(delta.const_data_ptr());
  const AttentionBackward& kernels = attention_backward();
  kernels.plan(call);
  const int64_t sequences = call.sequences(), query_blocks = call.query_blocks();
  const int64_t blocks = sequences * query_blocks, tasks = sequences * call.key_blocks();
  const Memory packed(q, blocks, kernels.packed_size(call));
  const Memory scratch(q, workers(tasks), kernels.scratch_size(call));
  Tickets tickets(blocks);
  run_tasks(blocks, workers(blocks), [&](int64_t block, int64_t) {
    const int64_t sequence = block / query_blocks, i = block % query_blocks;
    kernels.pack(call, sequence, i, packed[block]);
    tickets.set(block, call.key_blocks_of(sequence, i).first);
  });
  run_tasks(tasks, workers(tasks), [&](int64_t task, int64_t worker) {
    const int64_t sequence = task % sequences, key_block = task / sequences;
    kernels.begin(call, sequence, key_block, scratch[worker]);
    for (int64_t i = 0; i < query_blocks; ++i) {
      const KeyBlocks attended = call.key_blocks_of(sequence, i);
      if (key_block < attended.first || key_block >= attended.end) continue;
      const int64_t block = sequence * query_blocks + i;
      tickets.wait_for(block, key_block);
      kernels.step(call, sequence, key_block, i, packed[block], scratch[worker]);
      tickets.set(block, key_block + 1);
    }
    kernels.end(call, sequence, key_block, scratch[worker]);
  });
  run_tasks(blocks, workers(blocks), [&](int64_t block, int64_t) {
    kernels.write(call, block / query_blocks, block % query_blocks, packed[block]);
  });
  return {dq, dk, dv};
}

// Depends on the length alone, so that the result does not depend on the number of threads. 128
// splits of a long row occupy many threads; splits of fewer than 256 keys cost more than they gain.
int64_t keys_per_split(int64_t length) {
  constexpr int64_t kMinKeys = 256, kSplits = 128;
  return std::max(kMinKeys, (length + kSplits - 1) / kSplits);
}

Cache cache(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

void check_pages(const Tensor& table, int64_t row, int64_t used, int64_t pages) {
  const int32_t* const ids =
      static_cast<const int32_t*>(table.const_data_ptr()) + row * table.stride(0);
  for (int64_t i = 0; i < used; ++i)
    check(0 <= ids[i] && ids[i] < pages, "decode_attention: pages must lie in [0, ", pages,
          "), got ", ids[i]);
}

// The splits of all batch entries in order; those of entry i are [first[i], first[i + 1]).
struct Splits {
  std::vector<KeySplit> splits;
  std::vector<int64_t> first;

  Splits(const Tensor& k, const Tensor& lengths, const std::optional<Tensor>& table) {
    const int64_t page = k.size(1), capacity = page * (table ? table->size(1) : 1);
    for (int64_t row = 0; row < lengths.size(0); ++row) {
      const int64_t length = static_cast<const int32_t*>(lengths.const_data_ptr())[row];
      check(0 <= length && length <= capacity, "decode_attention: lengths must lie in [0, ",
            capacity, "], got ", length);
      if (table && length > 0) check_pages(*table, row, (length + page - 1) / page, k.size(0));
      first.push_back(static_cast<int64_t>(splits.size()));
      const int64_t size = keys_per_split(length);
      for (int64_t begin = 0; begin < length; begin += size)
        splits.push_back({row, length, begin, std::min(begin + size, length)});
    }
    first.push_back(static_cast<int64_t>(splits.size()));
  }
};

// q [B, T, H, K] and the caches have unit stride in K; lengths [B] and page_table [B, max_pages]
// are int32 with unit stride in their last dimension; mask [B, T] is contiguous.
Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
              const std::optional<Tensor>& table, const std::optional<Tensor>& mask, double scale) {
  constexpr double kLog2E = 1.4426950408889634;
  const int64_t batch = q.size(0);
  const DecodeCall call{dtype_of(q),
                        q.size(1),
                        q.size(2),
                        k.size(2),
                        q.size(3),
                        static_cast<float>(scale * kLog2E),
                        q.const_data_ptr(),
                        q.stride(0),
                        q.stride(1),
                        q.stride(2),
                        cache(k),
                        cache(v),
                        table ? Pages{static_cast<const int32_t*>(table->const_data_ptr()),
                                      table->stride(0), k.size(1)}
                              : Pages{},
                        data<uint64_t>(mask)};
  const Splits all(k, lengths, table);
  const int64_t num_splits = static_cast<int64_t>(all.splits.size());
  const int64_t queries = call.queries(), size = partial_size(call);
  Tensor out = empty(q, q.sizes());
  Tensor packed = empty(q, {batch * queries * call.padded()}, ScalarType::Float);
  Tensor partials = empty(q, {num_splits * queries * size}, ScalarType::Float);
  float* const packed_to = static_cast<float*>(packed.mutable_data_ptr());
  float* const partial = static_cast<float*>(partials.mutable_data_ptr());
  const DecodeAttention& kernels = decode_attention();
  for (int64_t row = 0; row < batch; ++row)
    kernels.pack(call, row, packed_to + row * queries * call.padded());
  torch::stable::parallel_for(0, num_splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const KeySplit& split = all.splits[i];
      kernels.attend(call, split, packed_to + split.row * queries * call.padded(),
                     partial + i * queries * size);
    }
  });
  torch::stable::parallel_for(0, batch * queries, 16, [&](int64_t begin, int64_t end) {
    const int64_t queries_per_kv = queries / call.kv_heads, heads = call.heads / call.kv_heads;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / queries, query = i % queries, first = all.first[row];
      const int64_t token = query % queries_per_kv / heads;
      const int64_t head = query / queries_per_kv * heads + query % heads;
      kernels.merge(
          call, partial + (first * queries + query) * size, all.first[row + 1] - first,
          queries * size,
          mutable_at(out, ((row * call.new_tokens + token) * call.heads + head) * call.head_dim));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor first, Tensor end, float scale, float "
      "dropout_p, Tensor? seed, Tensor? rows, Tensor? columns, SymInt first_head, SymInt "
      "all_heads, bool float32_out) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, "
      "Tensor first, Tensor end, float scale, float dropout_p, Tensor? seed, Tensor? rows, Tensor? "
      "columns, SymInt first_head, SymInt all_heads, bool float32_out) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? "
      "page_table, Tensor? mask, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_fwd));
  m.impl("attention_backward", TORCH_BOX(&attention_bwd));
  m.impl("decode_attention", TORCH_BOX(&decode));
}

}  // namespace emu3
