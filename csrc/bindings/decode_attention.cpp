#include "../cpu/decode_attention.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "torch_stable.h"

namespace emu3 {
namespace {

// Keys of a piece: settled by the length alone, so that the result does not depend on the threads.
// 128 pieces of a long row keep many threads busy; a short one is not worth more.
int64_t piece_size(int64_t length) {
  constexpr int64_t kFewest = 256, kPieces = 128;
  return std::max(kFewest, (length + kPieces - 1) / kPieces);
}

Cache cache(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

void check_pages(const Tensor& table, int64_t row, int64_t used, int64_t pages) {
  const int32_t* const ids =
      static_cast<const int32_t*>(table.const_data_ptr()) + row * table.stride(0);
  for (int64_t i = 0; i < used; ++i)
    if (ids[i] < 0 || ids[i] >= pages)
      refuse("decode_attention: pages must lie in [0, ", pages, "), got ", ids[i]);
}

// The pieces of every row, in order, and where those of a row begin.
struct Split {
  std::vector<Piece> pieces;
  std::vector<int64_t> first;

  Split(const Tensor& k, const Tensor& lengths, const std::optional<Tensor>& table) {
    const int64_t page = k.size(1), capacity = page * (table ? table->size(1) : 1);
    for (int64_t row = 0; row < lengths.size(0); ++row) {
      const int64_t length = static_cast<const int32_t*>(lengths.const_data_ptr())[row];
      if (length < 0 || length > capacity)
        refuse("decode_attention: lengths must lie in [0, ", capacity, "], got ", length);
      if (table && length > 0) check_pages(*table, row, (length + page - 1) / page, k.size(0));
      first.push_back(static_cast<int64_t>(pieces.size()));
      const int64_t size = piece_size(length);
      for (int64_t begin = 0; begin < length; begin += size)
        pieces.push_back({row, length, begin, std::min(begin + size, length)});
    }
    first.push_back(static_cast<int64_t>(pieces.size()));
  }
};

// q [B, t, H, K] and the caches with unit stride in K, lengths [B] and page_table [B, max_pages]
// int32, contiguous but for the rows of the table.
Tensor run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
           const std::optional<Tensor>& table, double scale) {
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
                              : Pages{}};
  const Split split(k, lengths, table);
  const int64_t num_pieces = static_cast<int64_t>(split.pieces.size());
  const int64_t queries = call.queries(), size = partial_size(call);
  using torch::headeronly::ScalarType;
  Tensor out = fresh(q, q.sizes());
  Tensor packed = fresh(q, {batch * queries * call.padded()}, ScalarType::Float);
  Tensor partials = fresh(q, {num_pieces * queries * size}, ScalarType::Float);
  float* const packed_to = static_cast<float*>(packed.mutable_data_ptr());
  float* const partial = static_cast<float*>(partials.mutable_data_ptr());
  const DecodeAttention& kernels = decode_attention();
  for (int64_t row = 0; row < batch; ++row)
    kernels.pack(call, row, packed_to + row * queries * call.padded());
  torch::stable::parallel_for(0, num_pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = split.pieces[i];
      kernels.attend(call, piece, packed_to + piece.row * queries * call.padded(),
                     partial + i * queries * size);
    }
  });
  torch::stable::parallel_for(0, batch * queries, 16, [&](int64_t begin, int64_t end) {
    const int64_t of_group = queries / call.groups, heads = call.heads / call.groups;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / queries, query = i % queries, first = split.first[row];
      const int64_t token = query % of_group / heads;
      const int64_t head = query / of_group * heads + query % heads;
      kernels.merge(
          call, partial + (first * queries + query) * size, split.first[row + 1] - first,
          queries * size,
          mutable_at(out, ((row * call.new_tokens + token) * call.heads + head) * call.width));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? "
      "page_table, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) { m.impl("decode_attention", TORCH_BOX(&run)); }

}  // namespace emu3
