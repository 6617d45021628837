// decode_attention.cuh on the CPU. Reads a call from stdin, writes its results to stdout; inputs
// end at an unmapped page, so that a read past the end is a segmentation fault.
#include "fiber.h"

#include "cuda/attention/decode_attention.cuh"
#include "guarded.h"

namespace {

struct Header {
  double scale;
  int64_t is_bfloat16, batch, new_tokens, heads_per_kv, kv_heads, head_dim, capacity, page;
  int64_t table_columns, has_mask, num_multiprocessors, seed;
  int64_t strides[9], bytes[3];  // of q, k and v
};

template <typename T>
emu3::DecodeHeads<T> read_heads(const Header& h, int which) {
  const int64_t* const strides = h.strides + 3 * which;
  return {static_cast<const T*>(read_guarded(h.bytes[which])), strides[0], strides[1], strides[2]};
}

template <typename T>
void run(const Header& h) {
  const int rows = static_cast<int>(h.new_tokens * h.heads_per_kv);
  const auto q = read_heads<T>(h, 0), k = read_heads<T>(h, 1), v = read_heads<T>(h, 2);
  const void* const lengths = read_guarded(h.batch * sizeof(int32_t));
  const void* const table = read_guarded(h.batch * h.table_columns * sizeof(int32_t));
  const void* const mask = read_guarded(h.batch * h.has_mask * h.new_tokens * sizeof(uint64_t));
  const int splits = emu3::decode_splits(h.batch, static_cast<int>(h.kv_heads), rows, h.capacity,
                                         static_cast<int>(h.num_multiprocessors));
  const int64_t rows_of_splits = h.batch * h.kv_heads * splits * rows;
  std::vector<float4> partial(rows_of_splits * h.head_dim / 4, make_float4(NAN, NAN, NAN, NAN));
  std::vector<float> lse(rows_of_splits, NAN);
  std::vector<float4> out(h.batch * h.kv_heads * rows * h.head_dim * sizeof(T) / 16,
                          make_float4(NAN, NAN, NAN, NAN));
  const emu3::Decode<T> call{q,
                             k,
                             v,
                             static_cast<const int32_t*>(lengths),
                             h.table_columns ? static_cast<const int32_t*>(table) : nullptr,
                             h.has_mask ? static_cast<const uint64_t*>(mask) : nullptr,
                             h.table_columns,
                             static_cast<int>(h.page),
                             static_cast<int>(h.new_tokens),
                             static_cast<int>(h.heads_per_kv),
                             static_cast<int>(h.kv_heads),
                             splits,
                             static_cast<float>(h.scale),
                             &partial[0].x,
                             lse.data(),
                             reinterpret_cast<T*>(out.data())};
  emu3::decode_attention(call, static_cast<int>(h.head_dim), h.batch, [&](auto kernel, dim3 grid) {
    fiber::launch(grid, {emu3::kDecodeThreads}, static_cast<unsigned>(h.seed),
                  [&] { kernel(call); });
  });
  fwrite(out.data(), sizeof(float4), out.size(), stdout);
}

}  // namespace

int main() {
  try {
    Header header;
    if (fread(&header, sizeof header, 1, stdin) != 1) throw std::runtime_error("no header");
    header.is_bfloat16 ? run<emu3::bfloat16>(header) : run<float>(header);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
