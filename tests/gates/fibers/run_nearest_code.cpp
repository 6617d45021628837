// nearest_code.cuh on the CPU. Reads a call from stdin, writes its ids to stdout; inputs end at an
// unmapped page, so that a read past the end is a segmentation fault.
#include "fiber.h"

#include "guarded.h"
#include "cuda/vq/nearest_code.cuh"

namespace {

struct Header {
  int64_t is_bfloat16, num_queries, positions, batch_stride, dim_stride, position_stride, dim;
  int64_t z_bytes, num_codes, num_multiprocessors, seed;
};

template <typename T>
void run(const Header& h) {
  const emu3::Latents<T> z{static_cast<const T*>(read_guarded(h.z_bytes)),
                           h.num_queries,
                           h.positions,
                           h.batch_stride,
                           h.dim_stride,
                           h.position_stride,
                           static_cast<int>(h.dim)};
  const int num_codes = static_cast<int>(h.num_codes);
  const size_t bytes = sizeof(float) * emu3::padded_dim(z.dim) * h.num_codes;
  const float4* codes = static_cast<const float4*>(read_guarded(bytes));
  std::vector<int64_t> ids(h.num_queries, -1);
  emu3::nearest_code(z, static_cast<int>(h.num_multiprocessors), [&](auto kernel, unsigned blocks) {
    fiber::launch({blocks}, {emu3::kThreads}, static_cast<unsigned>(h.seed),
                  [&] { kernel(z, codes, num_codes, ids.data()); });
  });
  fwrite(ids.data(), sizeof(int64_t), ids.size(), stdout);
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
