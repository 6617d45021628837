// causal_conv.cuh on the CPU. Reads a call from stdin, writes its results
// to stdout; inputs end at an unmapped page, so that a read past the end is a segmentation fault,
// and results are NaN until they are written.
#include "fiber.h"

#include "guarded.h"
#include "cuda/conv3d/causal_conv.cuh"

namespace {

struct Header {
  int64_t is_bfloat16, narrow_parameters, batch, channels, frames, height, width, out, results;
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

emu3::Parameter read_parameter(const Header& h, bool exists, int64_t count) {
  if (!exists) return {};
  if (h.narrow_parameters) return {read<emu3::bfloat16>(count), true};
  return {read<float>(count), false};
}

emu3::Weights read_weights(const Header& h) {
  const int64_t taps = h.kernel_frames * h.size_in_space * h.size_in_space;
  const emu3::Parameter weight = read_parameter(h, true, h.out * h.channels * taps);
  return {weight, read_parameter(h, h.has_bias, h.out), static_cast<int>(h.kernel_frames)};
}

emu3::Norm read_norm(const Header& h) {
  const emu3::Parameter scale = read_parameter(h, h.has_norm, h.channels);
  return {scale, read_parameter(h, h.has_norm, h.channels), h.silu != 0};
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
  const T* const residual = h.has_residual ? read<T>(results) : nullptr;
  const emu3::CausalConv<T> call{source,
                                 video<const T>(h, residual, h.out, h.results),
                                 target,
                                 weights,
                                 norm,
                                 static_cast<int>(h.stride),
                                 static_cast<int>(h.front),
                                 h.post_silu != 0};
  emu3::causal_conv(call, batch, static_cast<int>(h.size_in_space),
                    static_cast<int>(h.num_multiprocessors), [&](auto kernel, dim3 grid) {
                      fiber::launch(grid, {emu3::kConvThreads}, seed, [&] { kernel(call); });
                    });
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
