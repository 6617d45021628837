#include "bindings/group_norm_images.h"
#include "cpu/group_norm/spatial_norm.h"

namespace emu3 {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor, Tensor> group_norm_fwd(const Tensor& x, const Tensor& weight,
                                                  const Tensor& bias, int64_t groups, double eps,
                                                  bool silu) {
  const Images m = images_of(x, groups);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor mean = torch::stable::new_empty(x, {m.batch, groups}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {m.batch, groups}, ScalarType::Float);
  const bool past = past_caches(y);
  over_images(m, [&](int64_t first, int64_t count) {
    compute_statistics(m, x, first, count, eps, mean, rstd);
    const Floats affine = affine_of(m, first, count, mean, rstd, weight, bias);
    over_chunks(m, count, true, [&](int64_t image, int64_t, int64_t row, int64_t rows) {
      const int64_t offset = m.offset(first + image, row);
      group_norm().apply(m.dtype, at(x, offset), mutable_at(y, offset), rows, m.channels,
                         affine.at(image * 3 * m.padded), silu, past);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_bwd(const Tensor& dy, const Tensor& x,
                                                  const Tensor& weight, const Tensor& bias,
                                                  const Tensor& mean, const Tensor& rstd,
                                                  int64_t groups, bool silu) {
  const Images m = images_of(x, groups);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_empty(weight, {m.channels});
  Tensor dbias = torch::stable::new_empty(bias, {m.channels});
  const bool past = past_caches(dx);
  const int64_t size = 2 * m.padded;
  std::vector<double> grad_sums(size);
  over_images(m, [&](int64_t first, int64_t count) {
    const Floats affine = affine_of(m, first, count, mean, rstd, weight, bias);
    Floats parts(count * m.chunks * size), stat_grads(count * size);
    over_chunks(m, count, false, [&](int64_t image, int64_t unit, int64_t row, int64_t rows) {
      const int64_t offset = m.offset(first + image, row);
      group_norm().sums(m.dtype, at(dy, offset), at(x, offset), rows, m.channels,
                        affine.at(image * 3 * m.padded), silu, parts.at(unit * size));
    });
    std::vector<double> sums = sum_parts(parts, count, m.chunks, size);
    over_each(count, [&](int64_t i) {
      compute_stat_grads(m, &sums[i * size], rstd, weight, first + i, stat_grads.at(i * size));
    });
    for (int64_t i = 0; i < count * size; ++i) grad_sums[i % size] += sums[i];
    over_chunks(m, count, true, [&](int64_t image, int64_t, int64_t row, int64_t rows) {
      const int64_t offset = m.offset(first + image, row);
      group_norm().backward(m.dtype, at(dy, offset), at(x, offset), mutable_at(dx, offset), rows,
                            m.channels, affine.at(image * 3 * m.padded),
                            stat_grads.at(image * size), silu, past);
    });
  });
  group_norm().write(m.dtype, grad_sums.data(), mutable_at(dbias, 0), m.channels, 1);
  group_norm().write(m.dtype, grad_sums.data() + m.padded, mutable_at(dweight, 0), m.channels, 1);
  return {dx, dweight, dbias};
}

// Returns the source position of a pixel as F.interpolate(mode="nearest") computes it, in float32.
int64_t nearest(int64_t pixel, int64_t positions, int64_t pixels) {
  const float scale = static_cast<float>(positions) / static_cast<float>(pixels);
  return std::min(static_cast<int64_t>(static_cast<float>(pixel) * scale), positions - 1);
}

// Returns starts such that pixels [starts[p], starts[p + 1]) have source position p.
std::vector<int64_t> starts_of(int64_t positions, int64_t pixels) {
  std::vector<int64_t> starts(positions + 1, pixels);
  for (int64_t pixel = pixels - 1; pixel >= 0; --pixel)
    starts[nearest(pixel, positions, pixels)] = pixel;
  for (int64_t p = positions - 1; p >= 0; --p) starts[p] = std::min(starts[p], starts[p + 1]);
  return starts;
}

// Lines of an image, counted through its frames, with the same source row of the latent.
struct Lines {
  int64_t first, count, row;
};

// Returns at least 64 strips if the image has as many lines, so that all threads have work.
std::vector<Lines> strips_of(const Tensor& x, const Tensor& latent) {
  const int64_t frames = x.size(1), height = x.size(2), lines = frames * height;
  const int64_t most = std::max<int64_t>(1, lines / 64);
  std::vector<Lines> strips;
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t frame = nearest(line / height, latent.size(1), frames);
    const int64_t row = frame * latent.size(2) + nearest(line % height, latent.size(2), height);
    if (strips.empty() || strips.back().row != row || strips.back().count == most)
      strips.push_back({line, 0, row});
    ++strips.back().count;
  }
  return strips;
}

struct Parameters {
  const Tensor &weight, &bias, &y_weight, &y_bias, &b_weight, &b_bias;
};

// x [B, T, H, W, C] and its latent [B, t, h, w, L].
struct LatentImages {
  const Tensor &x, &latent;
  Images images;
  int64_t line_pixels, positions, latent_rows, width;
  std::vector<int64_t> starts;
  std::vector<Lines> strips;
  Floats tables;

  int64_t row_size() const { return positions * width; }
  int64_t offset(int64_t image, const Lines& lines) const {
    return images.offset(image, lines.first * line_pixels);
  }
  Strip strip(int64_t image, const Lines& lines, const float* affine, Floats& scratch) const {
    return {
        .lines = lines.count,
        .line_pixels = line_pixels,
        .channels = images.channels,
        .positions = positions,
        .width = width,
        .starts = starts.data(),
        .latent = at(latent, (image * latent_rows + lines.row) * row_size()),
        .affine = affine,
        .tables = tables.at(0),
        .scratch = scratch.at(0),
    };
  }
};

LatentImages latent_images_of(const Tensor& x, const Tensor& latent, int64_t groups,
                              const Parameters& p) {
  const Images images = images_of(x, groups);
  const int64_t width = latent.size(4);
  LatentImages m{
      .x = x,
      .latent = latent,
      .images = images,
      .line_pixels = x.size(3),
      .positions = latent.size(3),
      .latent_rows = latent.size(1) * latent.size(2),
      .width = width,
      .starts = starts_of(latent.size(3), x.size(3)),
      .strips = strips_of(x, latent),
      .tables = Floats(2 * (width + 1) * images.padded),
  };
  spatial_norm().tables(images.dtype, at(p.y_weight, 0), at(p.y_bias, 0), at(p.b_weight, 0),
                        at(p.b_bias, 0), images.channels, width, m.tables.at(0));
  return m;
}

// Calls body(image, unit, strip, offset of its pixels) in parallel; `unit` is the index of the
// strip in the batch. The reverse order starts with the pixels that the previous pass left in the
// caches.
template <typename Body>
void over_strips(const LatentImages& m, int64_t first, int64_t count, bool reverse,
                 const Floats& affine, Body body) {
  const int64_t each = m.strips.size(), units = count * each;
  const int64_t size = m.images.rows * m.images.channels / std::max<int64_t>(1, each);
  torch::stable::parallel_for(0, units, row_grain(size), [&](int64_t begin, int64_t end) {
    Floats scratch(strip_scratch(m.images.padded));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = reverse ? units - 1 - i : i, image = unit / each;
      const Lines& lines = m.strips[unit % each];
      const float* of_image = affine.at(image * 3 * m.images.padded);
      body(image, unit, m.strip(first + image, lines, of_image, scratch),
           m.offset(first + image, lines));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> spatial_norm_fwd(const Tensor& x, const Tensor& latent,
                                                    const Tensor& weight, const Tensor& bias,
                                                    const Tensor& y_weight, const Tensor& y_bias,
                                                    const Tensor& b_weight, const Tensor& b_bias,
                                                    int64_t groups, double eps, bool silu) {
  const LatentImages m =
      latent_images_of(x, latent, groups, {weight, bias, y_weight, y_bias, b_weight, b_bias});
  const Images& images = m.images;
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor mean = torch::stable::new_empty(x, {images.batch, groups}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {images.batch, groups}, ScalarType::Float);
  const bool past = past_caches(y);
  over_images(images, [&](int64_t first, int64_t count) {
    compute_statistics(images, x, first, count, eps, mean, rstd);
    const Floats affine = affine_of(images, first, count, mean, rstd, weight, bias);
    over_strips(m, first, count, true, affine,
                [&](int64_t, int64_t, const Strip& strip, int64_t offset) {
                  spatial_norm().apply(images.dtype, strip, at(x, offset), mutable_at(y, offset),
                                       silu, past);
                });
  });
  return {y, mean, rstd};
}

// Returns the sums of spatial_norm.h for each image and adds the gradient of the latent to
// `dlatent`.
std::vector<double> sums_of(const LatentImages& m, int64_t first, int64_t count,
                            const Floats& affine, const Tensor& dy, bool silu, float* dlatent) {
  const int64_t each = m.strips.size(), row = m.row_size();
  const int64_t size = (4 + 2 * m.width) * m.images.padded;
  Floats parts(count * each * size), rows(count * each * row);
  over_strips(m, first, count, false, affine,
              [&](int64_t, int64_t unit, const Strip& strip, int64_t offset) {
                spatial_norm().sums(m.images.dtype, strip, at(dy, offset), at(m.x, offset), silu,
                                    parts.at(unit * size), rows.at(unit * row));
              });
  for (int64_t i = 0; i < count * each; ++i) {
    float* to = dlatent + ((first + i / each) * m.latent_rows + m.strips[i % each].row) * row;
    for (int64_t z = 0; z < row; ++z) to[z] += rows.at(i * row)[z];
  }
  return sum_parts(parts, count, each, size);
}

// `grad_sums` are the sums of spatial_norm.h over the batch; the second is the gradient of the
// weight.
void write_gradients(const Images& m, int64_t width, const double* grad_sums, const Tensor& dweight,
                     const Tensor& dbias, const Tensor& dy_weight, const Tensor& dy_bias,
                     const Tensor& db_weight, const Tensor& db_bias) {
  const Tensor* plain[] = {&dbias, &dweight, &dy_bias, &db_bias};
  for (int64_t a = 0; a < 4 + 2 * width; ++a) {
    const Tensor& matrix = a < 4 + width ? dy_weight : db_weight;
    char* to = a < 4 ? mutable_at(*plain[a], 0) : mutable_at(matrix, (a - 4) % width);
    group_norm().write(m.dtype, grad_sums + a * m.padded, to, m.channels, a < 4 ? 1 : width);
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients spatial_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& latent,
                           const Tensor& weight, const Tensor& bias, const Tensor& y_weight,
                           const Tensor& y_bias, const Tensor& b_weight, const Tensor& b_bias,
                           const Tensor& mean, const Tensor& rstd, int64_t groups, bool silu) {
  const LatentImages m =
      latent_images_of(x, latent, groups, {weight, bias, y_weight, y_bias, b_weight, b_bias});
  const Images& images = m.images;
  const int64_t size = (4 + 2 * m.width) * images.padded;
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dlatent = torch::stable::new_zeros(latent, latent.sizes(), ScalarType::Float);
  const bool past = past_caches(dx);
  std::vector<double> grad_sums(size);
  over_images(images, [&](int64_t first, int64_t count) {
    const Floats affine = affine_of(images, first, count, mean, rstd, weight, bias);
    std::vector<double> sums =
        sums_of(m, first, count, affine, dy, silu, (float*)mutable_at(dlatent, 0));
    Floats stat_grads(count * 2 * images.padded);
    over_each(count, [&](int64_t i) {
      compute_stat_grads(images, &sums[i * size], rstd, weight, first + i,
                         stat_grads.at(i * 2 * images.padded));
    });
    for (int64_t i = 0; i < count * size; ++i) grad_sums[i % size] += sums[i];
    over_strips(m, first, count, true, affine,
                [&](int64_t image, int64_t, const Strip& strip, int64_t offset) {
                  spatial_norm().backward(images.dtype, strip, at(dy, offset), at(x, offset),
                                          mutable_at(dx, offset),
                                          stat_grads.at(image * 2 * images.padded), silu, past);
                });
  });
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  Tensor dweight = like(weight), dbias = like(bias), dy_weight = like(y_weight);
  Tensor dy_bias = like(y_bias), db_weight = like(b_weight), db_bias = like(b_bias);
  write_gradients(images, m.width, grad_sums.data(), dweight, dbias, dy_weight, dy_bias, db_weight,
                  db_bias);
  return {dx, dlatent, dweight, dbias, dy_weight, dy_bias, db_weight, db_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "group_norm_forward(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
      " Tensor rstd, int groups, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "spatial_norm_forward(Tensor x, Tensor latent, Tensor weight, Tensor bias, Tensor y_weight,"
      " Tensor y_bias, Tensor b_weight, Tensor b_bias, int groups, float eps, bool silu)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "spatial_norm_backward(Tensor dy, Tensor x, Tensor latent, Tensor weight, Tensor bias,"
      " Tensor y_weight, Tensor y_bias, Tensor b_weight, Tensor b_bias, Tensor mean, Tensor rstd,"
      " int groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_fwd));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_bwd));
  m.impl("spatial_norm_forward", TORCH_BOX(&spatial_norm_fwd));
  m.impl("spatial_norm_backward", TORCH_BOX(&spatial_norm_bwd));
}

}  // namespace emu3
