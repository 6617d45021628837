#include "cpu/conv2d/conv3x3.h"

#include "cpu/lib/gemm_tiles.h"
#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// Winograd F(4, 3) along one axis, at the points 0, 1, -1, 2, -2 and infinity: 6 inputs, 3 weights,
// 4 outputs (Lavin and Gray, arXiv 1509.09308).
inline void input_transform(const Vec (&d)[6], Vec (&v)[6]) {
  const Vec even = fma(d[2], splat(-4), d[4]), odd = fma(d[1], splat(-4), d[3]);
  const Vec even_half = d[4] - d[2], odd_half = 2.0f * (d[3] - d[1]);
  v[0] = fma(d[0], splat(4), fma(d[2], splat(-5), d[4]));
  v[1] = even + odd;
  v[2] = even - odd;
  v[3] = even_half + odd_half;
  v[4] = even_half - odd_half;
  v[5] = fma(d[1], splat(4), fma(d[3], splat(-5), d[5]));
}

inline void weight_transform(const Vec (&g)[3], Vec (&u)[6]) {
  const Vec outer = (g[0] + g[2]) * (-1.0f / 6), inner = g[1] * (1.0f / 6);
  const Vec far = fma(g[2], splat(1.0f / 6), g[0] * (1.0f / 24)), half = 0.5f * inner;
  u[0] = 0.25f * g[0];
  u[1] = outer - inner;
  u[2] = outer + inner;
  u[3] = far + half;
  u[4] = far - half;
  u[5] = g[2];
}

inline void output_transform(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec near = m[1] + m[2], near_diff = m[1] - m[2];
  const Vec far = m[3] + m[4], far_diff = m[3] - m[4];
  y[0] = m[0] + near + far;
  y[1] = fma(far_diff, splat(2), near_diff);
  y[2] = fma(far, splat(4), near);
  y[3] = fma(far_diff, splat(8), near_diff) + m[5];
}

void pack(const void* weight, int64_t in, int64_t begin, int64_t end, float* packed) {
  constexpr int64_t kBlock = 8;
  float transposed[3][3][kBlock][kOutBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    for (int64_t o = 0; o < kOutBlock; ++o)
      for (int64_t tap = 0; tap < 9; ++tap) {
        const bfloat16* const from = (const bfloat16*)weight + (o * 9 + tap) * in + first;
        for (int64_t c = 0; c < kBlock; ++c) {
          const uint32_t bits = uint32_t{from[c].bits} << 16;
          __builtin_memcpy(&transposed[tap / 3][tap % 3][c][o], &bits, sizeof bits);
        }
      }
    for (int64_t c = 0; c < kBlock; ++c)
      for (int64_t o = 0; o < kOutBlock; o += kLanes) {
        Vec half[3][6];
        for (int i = 0; i < 3; ++i) {
          Vec g[3];
          for (int k = 0; k < 3; ++k) g[k] = load(&transposed[i][k][c][o]);
          weight_transform(g, half[i]);
        }
        for (int j = 0; j < 6; ++j) {
          const Vec column[3] = {half[0][j], half[1][j], half[2][j]};
          Vec u[6];
          weight_transform(column, u);
          for (int i = 0; i < 6; ++i)
            store(packed + ((i * 6 + j) * in + first + c) * kOutBlock + o, u[i]);
        }
      }
  }
}

// The image, the first row and the first column of a tile.
struct Position {
  int64_t image, row, column;

  Position(const Conv3x3Call& call, int64_t tile)
      : image(tile / (call.rows() * call.columns())),
        row(tile / call.columns() % call.rows() * kSide),
        column(tile % call.columns() * kSide) {}
};

// K block: channels of kMRWide tiles that are adjacent at a point, in the order of the GEMM.
constexpr int64_t kKBlock = 16;
// Channels whose packed weights fit the L1 cache.
constexpr int64_t kKC = 128;
// Weights that kKBlock channels of kMRWide tiles prefetch: together, a block of tiles prefetches
// kKC channels.
constexpr int64_t kAhead = kOutBlock * kMRWide * kKBlock / kMaxTiles;
static_assert(kMaxTiles % kMRWide == 0 && kKC % kKBlock == 0);

// Transforms the 6x6 inputs of a tile; the points are `pitch` floats apart.
void transform_input(const Conv3x3Call& call, const Position& position, float* to, int64_t pitch) {
  const bfloat16* const image =
      (const bfloat16*)call.x + position.image * call.height * call.width * call.in;
  for (int64_t c = 0; c < call.in; c += kLanes) {
    Vec half[6][6];
    for (int j = 0; j < 6; ++j) {
      const int64_t column = position.column + j - 1;
      Vec d[6] = {}, v[6];
      for (int i = 0; i < 6; ++i) {
        const int64_t row = position.row + i - 1;
        if (row >= 0 && row < call.height && column >= 0 && column < call.width)
          d[i] = load(image + (row * call.width + column) * call.in + c);
      }
      input_transform(d, v);
      for (int i = 0; i < 6; ++i) half[i][j] = v[i];
    }
    float* const at = to + c / kKBlock * kKBlock * kMRWide + c % kKBlock;
    for (int i = 0; i < 6; ++i) {
      Vec v[6];
      input_transform(half[i], v);
      for (int j = 0; j < 6; ++j) store(at + (i * 6 + j) * pitch, v[j]);
    }
  }
}

// C (+)= A B for kMRWide tiles, kNRWide vectors of output channels and `count` input channels.
// Prefetches the inputs `next_inputs` floats further on and the weights of the next kKC channels.
inline void micro_kernel(const float* inputs, const float* weights, int64_t count, float* to,
                         bool overwrite, int64_t next_inputs, const float* next_weights) {
  Vec sum[kMRWide][kNRWide] = {};
  for (int64_t c = 0; c < count; c += kKBlock, inputs += kMRWide * kKBlock) {
    for (int i = 0; i < kMRWide; ++i) __builtin_prefetch(inputs + next_inputs + i * kKBlock);
    for (int i = 0; i < kAhead; i += 16, next_weights += 16) __builtin_prefetch(next_weights, 0, 2);
    for (int64_t k = 0; k < kKBlock; ++k, weights += kOutBlock) {
      Vec w[kNRWide];
      for (int v = 0; v < kNRWide; ++v) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kMRWide; ++i) {
        const Vec x = splat(inputs[i * kKBlock + k]);
#pragma GCC unroll 4
        for (int v = 0; v < kNRWide; ++v) sum[i][v] = fma(x, w[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kMRWide; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kNRWide; ++v) {
      float* const at = to + i * kOutBlock + v * kLanes;
      store(at, overwrite ? sum[i][v] : load(at) + sum[i][v]);
    }
}

// The GEMM of every point, [tiles, in] @ [in, kOutBlock], kKC input channels at a time.
void gemm(const Conv3x3Call& call, const float* inputs, int64_t tiles, const float* packed,
          float* gemm_out) {
  for (int64_t point = 0; point < kPoints; ++point) {
    for (int64_t c = 0; c < call.in; c += kKC)
      for (int64_t o = 0; o < kOutBlock; o += kNRWide * kLanes)
        for (int64_t tile = 0; tile < tiles; tile += kMRWide)
          micro_kernel(inputs + tile * call.in + c * kMRWide, packed + c * kOutBlock + o,
                       call.in - c < kKC ? call.in - c : kKC, gemm_out + tile * kOutBlock + o,
                       c == 0, call.in * kMRWide,
                       packed + (c + kKC) * kOutBlock + tile / kMRWide * kKC / kKBlock * kAhead);
    inputs += kMaxTiles * call.in;
    packed += call.in * kOutBlock;
    gemm_out += kMaxTiles * kOutBlock;
  }
}

// Transforms and writes the outputs of a tile for the kOutBlock channels from `first` on.
void transform_output(const Conv3x3Call& call, const Position& position, const float* gemm_out,
                      int64_t first) {
  constexpr int64_t kPitch = kMaxTiles * kOutBlock;
  for (int64_t o = 0; o < kOutBlock; o += kLanes) {
    Vec half[4][6];
    for (int j = 0; j < 6; ++j) {
      Vec m[6], y[4];
      for (int i = 0; i < 6; ++i) m[i] = load(gemm_out + (i * 6 + j) * kPitch + o);
      output_transform(m, y);
      for (int i = 0; i < 4; ++i) half[i][j] = y[i];
    }
    const Vec bias = load(call.bias + first + o);
    for (int i = 0; i < 4 && position.row + i < call.height; ++i) {
      Vec y[4];
      output_transform(half[i], y);
      for (int j = 0; j < 4 && position.column + j < call.width; ++j) {
        const int64_t pixel =
            (position.image * call.height + position.row + i) * call.width + position.column + j;
        const int64_t at = pixel * call.out + first + o;
        Vec result = y[j] + bias;
        if (call.residual) result += load((const bfloat16*)call.residual + at);
        store((bfloat16*)call.y + at, result);
      }
    }
  }
}

void forward(const Conv3x3Call& call, int64_t first, int64_t count, float* scratch) {
  float *const inputs = scratch, *const gemm_out = scratch + kPoints * kMaxTiles * call.in;
  // Rows of a register tile beyond the last repeat it.
  for (int64_t i = 0; i < count || i % kMRWide; ++i)
    transform_input(call, Position(call, first + (i < count ? i : count - 1)),
                    inputs + i / kMRWide * kMRWide * call.in + i % kMRWide * kKBlock,
                    kMaxTiles * call.in);
  for (int64_t o = 0; o < call.out; o += kOutBlock) {
    gemm(call, inputs, count, call.packed_weights + o * kPoints * call.in, gemm_out);
    for (int64_t i = 0; i < count; ++i)
      transform_output(call, Position(call, first + i), gemm_out + i * kOutBlock, o);
  }
}

}  // namespace

extern const Conv3x3 conv3x3{pack, forward};

}  // namespace emu3::EMU3_LEVEL
