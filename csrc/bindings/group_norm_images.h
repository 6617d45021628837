// Images [B, ..., C] in channels-last memory and parallel loops over them, shared by
// group_norm_silu and spatial_norm_silu. No result depends on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/group_norm/group_norm.h"
#include "bindings/torch_stable.h"

namespace emu3 {

// Zeros aligned to a cache line; so is every array of padded_channels() floats in them.
class Floats {
 public:
  explicit Floats(int64_t count) : lines_((count + 15) / 16) {}
  float* at(int64_t i) { return lines_.data()->lane + i; }
  const float* at(int64_t i) const { return lines_.data()->lane + i; }

 private:
  struct alignas(64) Line {
    float lane[16];
  };
  std::vector<Line> lines_;
};

struct Images {
  Dtype dtype;
  int64_t batch, rows, channels, padded, groups;
  int64_t chunk_rows, chunks;  // an image in chunks of about 65,536 elements
  int64_t at_once;             // images that fit the caches between two passes

  int64_t offset(int64_t image, int64_t row) const { return (image * rows + row) * channels; }
};

inline Images images_of(const Tensor& x, int64_t groups) {
  constexpr int64_t kChunk = 65536, kBytes = 16 << 20;
  Images m{.dtype = dtype_of(x), .batch = x.size(0), .rows = 1, .groups = groups};
  for (int64_t d = 1; d + 1 < x.dim(); ++d) m.rows *= x.size(d);
  m.channels = x.size(x.dim() - 1);
  m.padded = padded_channels(m.channels);
  m.chunk_rows = std::max<int64_t>(8, kChunk / m.channels);
  m.chunks = (m.rows + m.chunk_rows - 1) / m.chunk_rows;
  const int64_t bytes = m.rows * m.channels * static_cast<int64_t>(x.element_size());
  m.at_once = std::max<int64_t>(1, kBytes / std::max<int64_t>(1, bytes));
  return m;
}

// Calls some(first, count) for groups of images that fit the caches.
template <typename Some>
void over_images(const Images& m, Some some) {
  for (int64_t first = 0; first < m.batch; first += m.at_once)
    some(first, std::min(m.at_once, m.batch - first));
}

// Calls chunk(image, unit, row, rows) in parallel; `unit` is the index of the chunk in all images.
// The reverse order starts with the pixels that the previous pass left in the caches.
template <typename Chunk>
void over_chunks(const Images& m, int64_t count, bool reverse, Chunk chunk) {
  const int64_t units = count * m.chunks, grain = row_grain(m.chunk_rows * m.channels);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = reverse ? units - 1 - i : i, row = unit % m.chunks * m.chunk_rows;
      chunk(unit / m.chunks, unit, row, std::min(m.chunk_rows, m.rows - row));
    }
  });
}

// Calls image(i) in parallel, for work of a few thousand operations an image.
template <typename Image>
void over_each(int64_t count, Image image) {
  torch::stable::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) image(i);
  });
}

// Writes the statistics of images [first, first + count) to mean and rstd [B, groups].
inline void compute_statistics(const Images& m, const Tensor& x, int64_t first, int64_t count,
                               double eps, const Tensor& mean, const Tensor& rstd) {
  Floats moments(count * m.chunks * 2 * m.padded);
  over_chunks(m, count, false, [&](int64_t image, int64_t unit, int64_t row, int64_t rows) {
    group_norm().moments(m.dtype, at(x, m.offset(first + image, row)), rows, m.channels,
                         moments.at(unit * 2 * m.padded));
  });
  over_each(count, [&](int64_t i) {
    std::vector<double> scratch(2 * m.padded);
    group_norm().statistics(m.dtype, moments.at(i * m.chunks * 2 * m.padded), m.chunk_rows, m.rows,
                            m.channels, m.groups, eps, scratch.data(),
                            (float*)mutable_at(mean, (first + i) * m.groups),
                            (float*)mutable_at(rstd, (first + i) * m.groups));
  });
}

// Returns the affine of images [first, first + count): three arrays each.
inline Floats affine_of(const Images& m, int64_t first, int64_t count, const Tensor& mean,
                        const Tensor& rstd, const Tensor& weight, const Tensor& bias) {
  Floats affine(count * 3 * m.padded);
  over_each(count, [&](int64_t i) {
    const int64_t group = (first + i) * m.groups;
    group_norm().affine(m.dtype, (const float*)at(mean, group), (const float*)at(rstd, group),
                        at(weight, 0), at(bias, 0), m.channels, m.groups,
                        affine.at(i * 3 * m.padded));
  });
  return affine;
}

// Computes the stat_grads of an image from its sums; the second sum becomes the gradient of the
// weight.
inline void compute_stat_grads(const Images& m, double* sums, const Tensor& rstd,
                               const Tensor& weight, int64_t image, float* stat_grads) {
  group_norm().stat_grads(m.dtype, sums, (const float*)at(rstd, image * m.groups), at(weight, 0),
                          m.rows, m.channels, m.groups, stat_grads);
}

// Sums the parts of each image, `size` floats each, in order.
inline std::vector<double> sum_parts(const Floats& from, int64_t count, int64_t parts,
                                     int64_t size) {
  std::vector<double> sums(count * size);
  const int64_t slices = size / 32;  // size is a multiple of a padded number of channels
  torch::stable::parallel_for(0, count * slices, 1 + 1024 / (1 + parts), [&](int64_t b, int64_t e) {
    for (int64_t slice = b; slice < e; ++slice) {
      const float* part = from.at(slice / slices * parts * size + slice % slices * 32);
      for (int64_t p = 0; p < parts; ++p, part += size)
        for (int64_t i = 0; i < 32; ++i) sums[slice * 32 + i] += part[i];
    }
  });
  return sums;
}

}  // namespace emu3
