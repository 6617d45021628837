// causal_conv.cuh and temporal_residual.cuh on the CPU. Reads a call from stdin, writes its results
// to stdout; inputs end at an unmapped page, so that a read past the end is a segmentation fault,
// and results are NaN until they are written.
#include "fiber.h"

#include "guarded.h"
#include "cuda/conv3d/temporal_residual.cuh"

namespace {

struct Header {
  int64_t is_bfloat16, is_block, batch, channels, frames, height, width, out, results;
  int64_t kernel_frames, size_in_space, stride, front, has_bias, has_norm, has_residual;
  int64_t silu, post_silu, aligned, num_multiprocessors, seed;
};

template <typename T>
emu3::Video<T> video(const Header& h, T* data, int64_t channels, int64_t frames) {
  return {data,
          static_cast<int>(channels),
          static_cast<int>(frames),
          static_cast<int>(h.height),
          static_cast<int>(h.width),
          h.aligned != 0};
}

template <typename T>
const T* read(int64_t count) {
  return static_cast<const T*>(read_guarded(count * sizeof(T)));
}

emu3::Weights read_weights(const Header& h) {
  const int64_t taps = h.kernel_frames * h.size_in_space * h.size_in_space;
  const float* const weight = read<float>(h.out * h.channels * taps);
  const float* const bias = h.has_bias ? read<float>(h.out) : nullptr;
  return {weight, bias, static_cast<int>(h.kernel_frames)};
}

emu3::Norm read_norm(const Header& h) {
  const float* const scale = h.has_norm ? read<float>(h.channels) : nullptr;
  return {scale, h.has_norm ? read<float>(h.channels) : nullptr, h.silu != 0};
}

template <typename T>
void run(const Header& h) {
  const int64_t places = h.batch * h.height * h.width, results = places * h.out * h.results;
  const T* const x = read<T>(places * h.channels * h.frames);
  const emu3::Norm norm = read_norm(h);
  const emu3::Weights weights = read_weights(h);
  T* const y = static_cast<T*>(guarded(results * sizeof(T)));
  memset(y, 0xff, results * sizeof(T));
  const auto source = video<const T>(h, x, h.channels, h.frames);
  const auto target = video<T>(h, y, h.out, h.results);
  const int batch = static_cast<int>(h.batch);
  const unsigned seed = static_cast<unsigned>(h.seed);
  if (h.is_block) {
    const emu3::Norm second_norm = read_norm(h);
    const emu3::TemporalResidual<T> block{source, target,      weights, read_weights(h),
                                          norm,   second_norm, 0};
    emu3::temporal_residual(block, batch, static_cast<int>(h.num_multiprocessors),
                            [&](auto kernel, dim3 grid, const emu3::TemporalResidual<T>& call) {
                              fiber::launch(grid, {emu3::kBlockThreads}, seed,
                                            [&] { kernel(call); });
                            });
  } else {
    const T* const residual = h.has_residual ? read<T>(results) : nullptr;
    const emu3::CausalConv<T> call{source,
                                   video<const T>(h, residual, h.out, h.results),
                                   target,
                                   weights,
                                   norm,
                                   static_cast<int>(h.stride),
                                   static_cast<int>(h.front),
                                   h.post_silu != 0};
    emu3::causal_conv(call, batch, static_cast<int>(h.size_in_space), [&](auto kernel, dim3 grid) {
      fiber::launch(grid, {emu3::kConvThreads}, seed, [&] { kernel(call); });
    });
  }
  fwrite(y, sizeof(T), results, stdout);
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
