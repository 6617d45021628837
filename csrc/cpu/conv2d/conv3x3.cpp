#include "cpu/conv2d/conv3x3.h"

#include "cpu/lib/gemm_tiles.h"
#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// F(4, 3) of one axis, at the points 0, 1, -1, 2, -2 and infinity: 6 pixels, 3 weights, 4 results
// (Lavin and Gray, arXiv 1509.09308).
inline void pixels_to_points(const Vec (&d)[6], Vec (&v)[6]) {
  const Vec even = fma(d[2], splat(-4), d[4]), odd = fma(d[1], splat(-4), d[3]);
  const Vec narrow = d[4] - d[2], slope = 2.0f * (d[3] - d[1]);
  v[0] = fma(d[0], splat(4), fma(d[2], splat(-5), d[4]));
  v[1] = even + odd;
  v[2] = even - odd;
  v[3] = narrow + slope;
  v[4] = narrow - slope;
  v[5] = fma(d[1], splat(4), fma(d[3], splat(-5), d[5]));
}

inline void weights_to_points(const Vec (&g)[3], Vec (&u)[6]) {
  const Vec outer = (g[0] + g[2]) * (-1.0f / 6), inner = g[1] * (1.0f / 6);
  const Vec far = fma(g[2], splat(1.0f / 6), g[0] * (1.0f / 24)), half = 0.5f * inner;
  u[0] = 0.25f * g[0];
  u[1] = outer - inner;
  u[2] = outer + inner;
  u[3] = far + half;
  u[4] = far - half;
  u[5] = g[2];
}

inline void points_to_results(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec near = m[1] + m[2], near_slope = m[1] - m[2];
  const Vec far = m[3] + m[4], far_slope = m[3] - m[4];
  y[0] = m[0] + near + far;
  y[1] = fma(far_slope, splat(2), near_slope);
  y[2] = fma(far, splat(4), near);
  y[3] = fma(far_slope, splat(8), near_slope) + m[5];
}

void pack(const void* weight, int64_t in, int64_t begin, int64_t end, float* panel) {
  constexpr int64_t kBlock = 8;
  float turned[3][3][kBlock][kPanelOut];
  for (int64_t first = begin; first < end; first += kBlock) {
    for (int64_t o = 0; o < kPanelOut; ++o)
      for (int64_t tap = 0; tap < 9; ++tap) {
        const bfloat16* const from = (const bfloat16*)weight + (o * 9 + tap) * in + first;
        for (int64_t c = 0; c < kBlock; ++c) {
          const uint32_t bits = uint32_t{from[c].bits} << 16;
          __builtin_memcpy(&turned[tap / 3][tap % 3][c][o], &bits, sizeof bits);
        }
      }
    for (int64_t c = 0; c < kBlock; ++c)
      for (int64_t o = 0; o < kPanelOut; o += kLanes) {
        Vec half[3][6];
        for (int i = 0; i < 3; ++i) {
          Vec g[3];
          for (int k = 0; k < 3; ++k) g[k] = load(&turned[i][k][c][o]);
          weights_to_points(g, half[i]);
        }
        for (int j = 0; j < 6; ++j) {
          const Vec column[3] = {half[0][j], half[1][j], half[2][j]};
          Vec u[6];
          weights_to_points(column, u);
          for (int i = 0; i < 6; ++i)
            store(panel + ((i * 6 + j) * in + first + c) * kPanelOut + o, u[i]);
        }
      }
  }
}

// The place of a tile: its image, and its first row and column.
struct Place {
  int64_t image, row, column;

  Place(const Conv3x3Call& call, int64_t tile)
      : image(tile / (call.rows() * call.columns())),
        row(tile / call.columns() % call.rows() * kSide),
        column(tile % call.columns() * kSide) {}
};

// Channels of kFlat tiles that lie together at a point, in the order in which products read them.
constexpr int64_t kTogether = 16;
// Channels whose weights in a panel stay in the first cache.
constexpr int64_t kStretch = 128;
// Weights that kTogether channels of kFlat tiles ask for: a whole block of tiles, for a stretch.
constexpr int64_t kAhead = kPanelOut * kFlat * kTogether / kMostTiles;
static_assert(kMostTiles % kFlat == 0 && kStretch % kTogether == 0);

// The 6x6 pixels of a tile to points, `pitch` floats apart.
void take_pixels(const Conv3x3Call& call, const Place& place, float* to, int64_t pitch) {
  const bfloat16* const image =
      (const bfloat16*)call.x + place.image * call.height * call.width * call.in;
  for (int64_t c = 0; c < call.in; c += kLanes) {
    Vec half[6][6];
    for (int j = 0; j < 6; ++j) {
      const int64_t column = place.column + j - 1;
      Vec d[6] = {}, v[6];
      for (int i = 0; i < 6; ++i) {
        const int64_t row = place.row + i - 1;
        if (row >= 0 && row < call.height && column >= 0 && column < call.width)
          d[i] = load(image + (row * call.width + column) * call.in + c);
      }
      pixels_to_points(d, v);
      for (int i = 0; i < 6; ++i) half[i][j] = v[i];
    }
    float* const at = to + c / kTogether * kTogether * kFlat + c % kTogether;
    for (int i = 0; i < 6; ++i) {
      Vec v[6];
      pixels_to_points(half[i], v);
      for (int j = 0; j < 6; ++j) store(at + (i * 6 + j) * pitch, v[j]);
    }
  }
}

// Adds the products of `count` channels in of kFlat tiles with kWide vectors of channels out, and
// asks for the pixels `next_pixels` further on and for weights of the next stretch.
inline void add_products(const float* pixels, const float* weights, int64_t count, float* to,
                         bool from_zero, int64_t next_pixels, const float* next_weights) {
  Vec sum[kFlat][kWide] = {};
  for (int64_t c = 0; c < count; c += kTogether, pixels += kFlat * kTogether) {
    for (int i = 0; i < kFlat; ++i) __builtin_prefetch(pixels + next_pixels + i * kTogether);
    for (int i = 0; i < kAhead; i += 16, next_weights += 16) __builtin_prefetch(next_weights, 0, 2);
    for (int64_t k = 0; k < kTogether; ++k, weights += kPanelOut) {
      Vec w[kWide];
      for (int v = 0; v < kWide; ++v) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kFlat; ++i) {
        const Vec x = splat(pixels[i * kTogether + k]);
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) sum[i][v] = fma(x, w[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kFlat; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) {
      float* const at = to + i * kPanelOut + v * kLanes;
      store(at, from_zero ? sum[i][v] : load(at) + sum[i][v]);
    }
}

// Products at every point: [tiles, in] with [in, kPanelOut] of the panel, stretch by stretch.
void multiply(const Conv3x3Call& call, const float* pixels, int64_t tiles, const float* panel,
              float* products) {
  for (int64_t point = 0; point < kPoints; ++point) {
    for (int64_t c = 0; c < call.in; c += kStretch)
      for (int64_t o = 0; o < kPanelOut; o += kWide * kLanes)
        for (int64_t tile = 0; tile < tiles; tile += kFlat)
          add_products(
              pixels + tile * call.in + c * kFlat, panel + c * kPanelOut + o,
              call.in - c < kStretch ? call.in - c : kStretch, products + tile * kPanelOut + o,
              c == 0, call.in * kFlat,
              panel + (c + kStretch) * kPanelOut + tile / kFlat * kStretch / kTogether * kAhead);
    pixels += kMostTiles * call.in;
    panel += call.in * kPanelOut;
    products += kMostTiles * kPanelOut;
  }
}

// Writes the results of a tile, of the kPanelOut channels from `first` on.
void write_results(const Conv3x3Call& call, const Place& place, const float* products,
                   int64_t first) {
  constexpr int64_t kPitch = kMostTiles * kPanelOut;
  for (int64_t o = 0; o < kPanelOut; o += kLanes) {
    Vec half[4][6];
    for (int j = 0; j < 6; ++j) {
      Vec m[6], y[4];
      for (int i = 0; i < 6; ++i) m[i] = load(products + (i * 6 + j) * kPitch + o);
      points_to_results(m, y);
      for (int i = 0; i < 4; ++i) half[i][j] = y[i];
    }
    const Vec bias = load(call.bias + first + o);
    for (int i = 0; i < 4 && place.row + i < call.height; ++i) {
      Vec y[4];
      points_to_results(half[i], y);
      for (int j = 0; j < 4 && place.column + j < call.width; ++j) {
        const int64_t pixel =
            (place.image * call.height + place.row + i) * call.width + place.column + j;
        const int64_t at = pixel * call.out + first + o;
        Vec result = y[j] + bias;
        if (call.residual) result += load((const bfloat16*)call.residual + at);
        store((bfloat16*)call.y + at, result);
      }
    }
  }
}

void results(const Conv3x3Call& call, int64_t first, int64_t count, float* scratch) {
  float *const pixels = scratch, *const products = scratch + kPoints * kMostTiles * call.in;
  // Rows of a register tile beyond the last repeat it.
  for (int64_t i = 0; i < count || i % kFlat; ++i)
    take_pixels(call, Place(call, first + (i < count ? i : count - 1)),
                pixels + i / kFlat * kFlat * call.in + i % kFlat * kTogether, kMostTiles * call.in);
  for (int64_t o = 0; o < call.out; o += kPanelOut) {
    multiply(call, pixels, count, call.panels + o * kPoints * call.in, products);
    for (int64_t i = 0; i < count; ++i)
      write_results(call, Place(call, first + i), products + i * kPanelOut, o);
  }
}

}  // namespace

extern const Conv3x3 conv3x3{pack, results};

}  // namespace emu3::EMU3_LEVEL
