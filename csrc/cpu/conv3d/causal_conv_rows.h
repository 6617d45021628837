// Staging of the source of a convolution row by row, and the convolution of a row of outputs.
// Include only in files that are compiled once per level, as simd.h.
#pragma once

#include "cpu/conv3d/causal_conv.h"
#include "cpu/lib/silu.h"
#include "cpu/lib/words.h"

namespace emu3::EMU3_LEVEL {

// Vectors of columns of a register tile of kOut output channels.
constexpr int kMaxVectors = kLanes == 16 ? 4 : 2;

// Loads the first `count` <= kLanes elements, padded with zeros.
template <typename T>
inline Vec load(const T* from, int64_t count) {
  if (count == kLanes) return load(from);
  T block[kLanes] = {};
  __builtin_memcpy(block, from, count * sizeof *from);
  return load(block);
}

template <typename T>
inline void store(T* to, Vec x, int64_t count) {
  count == kLanes ? store(to, x) : store_tail(to, x, count);
}

// Calls block(i, count) for every vector, with count < kLanes for the tail.
template <typename Block>
inline void over_vectors(int64_t count, Block block) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) block(i, kLanes);
  if (i < count) block(i, count - i);
}

// The norm and activation of channel c before a convolution.
struct Activation {
  Vec scale, shift;
  bool with_norm, with_silu;

  Activation(const float* scales, const float* shifts, bool silu, int64_t c)
      : scale(splat(scales ? scales[c] : 1)),
        shift(splat(shifts ? shifts[c] : 0)),
        with_norm(scales),
        with_silu(silu) {}
  Vec normed(Vec x) const { return with_norm ? fma(scale, x, shift) : x; }
  Vec operator()(Vec x) const {
    x = normed(x);
    return with_silu ? silu(x) : x;
  }
};

// Elements of a window: float; uint32_t, a word of two bfloat16 channels of a column; or bfloat16,
// of which two adjacent columns form a word.
template <typename Element>
constexpr int64_t kChannelsPerWord = 1;  // channels
template <>
constexpr int64_t kChannelsPerWord<uint32_t> = 2;

template <typename Element>
struct DotOfElement {
  typedef FloatDot type;
};
#if defined(__AVX512BF16__)
constexpr int64_t kBfloat16ChannelsPerWord = 2;
template <>
struct DotOfElement<uint32_t> {
  typedef Bfloat16PairDot type;
};
template <>
struct DotOfElement<bfloat16> {
  typedef Bfloat16PairDot type;
};
#else
constexpr int64_t kBfloat16ChannelsPerWord = 1;
#endif
template <typename Element>
using Dot = typename DotOfElement<Element>::type;

// Calls body with a value of the type of the elements of the window of `conv`.
template <typename Body>
inline void with_elements(const Conv& conv, Body body) {
#if defined(__AVX512BF16__)
  if (conv.channels_per_word == 2) return body(uint32_t{});
#endif
  body(float{});
}

template <typename Element>
inline void put(Element* to, Vec x, Vec, int64_t count) {
  store(to, x, count);
}

inline void put(uint32_t* to, Vec x, Vec next, int64_t count) {
  const BitVec both = to_bfloat16_pair({x, next});
  __builtin_memcpy(to, &both, count * sizeof *to);
}

template <typename Element>
struct Tap {
  const Element* row;
  int64_t weight;  // offset in the packed weight of a block of output channels
  bool last;       // tap of its frame
};

// A ring of the source frames that the current outputs read, after norm and activation in float32,
// for the rows of a tile. The padding of rows is zeroed once and never written.
template <typename Element>
class Window {
 public:
  Window(const Conv& conv, int64_t row, int64_t row_end, float* memory)
      : conv_(conv),
        layout_(conv.columns),
        first_row_(conv.rows.first(row)),
        num_rows_(conv.rows.last(row_end - 1) + 1 - first_row_),
        pitch_(conv.words() * layout_.channel()),
        memory_((Element*)memory),
        line_((Element*)(memory + window_size(conv, row_end - row))) {}

  int64_t channel() const { return layout_.channel(); }
  int64_t pitch() const { return pitch_; }
  int64_t first_row() const { return first_row_; }
  int64_t end_row() const { return first_row_ + num_rows_; }

  // The offset at which column tap k of the first output reads.
  int64_t offset(int64_t k) const {
    return k % layout_.phases * layout_.phase + k / layout_.phases;
  }

  Element* row(int64_t frame, int64_t row) const {
    return memory_ + (frame % conv_.time.kernel * num_rows_ + row - first_row_) * pitch_;
  }

  // Stages the frames that the outputs of frame t read and that are missing; t must not decrease.
  template <typename T>
  void reach(const T* x, int64_t t) {
    const int64_t frame_size = conv_.rows.source * conv_.columns.source;
    const int64_t first = conv_.time.first(t), last = conv_.time.last(t);
    for (next_ = next_ > first ? next_ : first; next_ <= last; ++next_)
      for (int64_t r = first_row_; r < end_row(); ++r)
        stage(x + next_ * frame_size + r * conv_.columns.source, conv_.time.source * frame_size,
              row(next_, r));
  }

  // Stages one row of all channels, `stride` elements apart.
  template <typename T>
  void stage(const T* x, int64_t stride, Element* to) {
    const bool adjacent = layout_.spread == 1 && layout_.phases == 1;
    for (int64_t c = 0; c < conv_.in; c += kChannelsPerWord<Element>, to += channel()) {
      Element* const line = adjacent ? to + layout_.base : line_;
      stage_words(x + c * stride, stride, c, line);
      if (!adjacent) scatter(line, to);
    }
  }

  // Lists the taps of a row of outputs that do not read padding.
  int taps(int64_t t, int64_t h, Tap<Element>* taps) const {
    const int64_t size = conv_.words() * conv_.columns.kernel * kOut;
    int count = 0;
    for (int64_t a = 0; a < conv_.time.kernel; ++a) {
      const int64_t frame = conv_.time.at(t, a);
      for (int64_t b = 0; frame >= 0 && b < conv_.rows.kernel; ++b) {
        const int64_t from = conv_.rows.at(h, b);
        if (from >= 0)
          taps[count++] = {row(frame, from), (a * conv_.rows.kernel + b) * size, false};
      }
      if (count) taps[count - 1].last = true;
    }
    return count;
  }

 private:
  // Stages channel c and the other in its words, zeros if there is none.
  template <typename T>
  void stage_words(const T* x, int64_t stride, int64_t c, Element* line) {
    const Activation activate(conv_.scale, conv_.shift, conv_.silu, c);
    const auto each = [&](auto next) {
      over_vectors(conv_.columns.source, [&](int64_t w, int64_t count) {
        put(line + w, activate(load(x + w, count)), next(w, count), count);
      });
    };
    if (kChannelsPerWord<Element> == 2 && c + 1 < conv_.in) {
      const Activation activate_next(conv_.scale, conv_.shift, conv_.silu, c + 1);
      each([&](int64_t w, int64_t count) { return activate_next(load(x + stride + w, count)); });
    } else {
      each([](int64_t, int64_t) { return Vec{}; });
    }
  }

  void scatter(const Element* line, Element* to) const {
    for (int64_t w = 0, q = layout_.base; w < conv_.columns.source; ++w, q += layout_.spread)
      to[q % layout_.phases * layout_.phase + q / layout_.phases] = line[w];
  }

  const Conv& conv_;
  const RowLayout layout_;
  const int64_t first_row_, num_rows_, pitch_;
  Element *const memory_, *const line_;
  int64_t next_ = 0;
};

struct ColumnTaps {
  int64_t offset[kMaxColumnTaps];

  template <typename Element>
  ColumnTaps(const Conv& conv, const Window<Element>& window) {
    for (int64_t k = 0; k < conv.columns.kernel; ++k) offset[k] = window.offset(k);
  }
};

// Accumulates kVectors vectors of columns of kOut channels: over the rows, input channels and
// column taps of each frame, in this order, then over frames, since one long sum is less accurate.
template <int kVectors, typename Element>
__attribute__((always_inline)) inline void sum_columns(const Conv& conv, const ColumnTaps& columns,
                                                       int64_t channel, const Tap<Element>* taps,
                                                       int num_taps, const uint32_t* weight,
                                                       int64_t j, Vec (&acc)[kOut][kVectors]) {
  Vec sum[kOut][kVectors] = {};
  for (int i = 0; i < num_taps; ++i) {
    const Element* x = taps[i].row + j;
    const uint32_t* w = weight + taps[i].weight;
    for (int64_t c = 0; c < conv.words(); ++c, x += channel)
      for (int64_t k = 0; k < conv.columns.kernel; ++k, w += kOut) {
        BitVec column[kVectors];
        for (int v = 0; v < kVectors; ++v)
          column[v] = load_words((const uint32_t*)(x + columns.offset[k] + v * kLanes));
        for (int o = 0; o < kOut; ++o) {
          const BitVec factor = w[o] - BitVec{};
          for (int v = 0; v < kVectors; ++v)
            sum[o][v] = Dot<Element>::dot(factor, column[v], sum[o][v]);
        }
      }
    for (int o = 0; taps[i].last && o < kOut; ++o)
      for (int v = 0; v < kVectors; ++v) {
        acc[o][v] += sum[o][v];
        sum[o][v] = Vec{};
      }
  }
}

// Calls emit(o, j, count, sums) for every vector of columns j of every channel o of a row of
// outputs.
template <typename Element, typename Emit>
inline void convolve_row(const Conv& conv, const Window<Element>& window, const ColumnTaps& columns,
                         int64_t t, int64_t h, Emit emit) {
  Tap<Element> taps[kMaxRowTaps];
  const int num_taps = window.taps(t, h, taps);
  const int64_t width = conv.columns.outputs, block = conv.words() * conv.taps() * kOut;
  for (int64_t first = 0; first < conv.out; first += kOut) {
    const uint32_t* const weight = conv.weight + first / kOut * block;
    const int num_out = conv.out - first < kOut ? conv.out - first : kOut;
    const auto columns_from = [&]<int kVectors>(int64_t j) __attribute__((always_inline)) {
      Vec sum[kOut][kVectors] = {};
      sum_columns<kVectors>(conv, columns, window.channel(), taps, num_taps, weight, j, sum);
      for (int o = 0; o < num_out; ++o)
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = j + v * kLanes, rest = width - at;
          emit(first + o, at, rest < kLanes ? rest : kLanes, sum[o][v]);
        }
    };
    int64_t j = 0;
    for (; j + (kMaxVectors - 1) * kLanes < width; j += kMaxVectors * kLanes)
      columns_from.template operator()<kMaxVectors>(j);
    if (kMaxVectors == 4 && j + kLanes < width) {
      columns_from.template operator()<2>(j);
      j += 2 * kLanes;
    }
    for (; j < width; j += kLanes) columns_from.template operator()<1>(j);
  }
}

// Returns the offset of row h of frame t of the first output channel of the element of a tile.
inline int64_t output_row(const Conv& conv, const Tile& tile, int64_t t, int64_t h) {
  return tile.batch * conv.output_size() + (t * conv.rows.outputs + h) * conv.columns.outputs;
}

inline int64_t output_channel_stride(const Conv& conv) {
  return conv.time.outputs * conv.rows.outputs * conv.columns.outputs;
}

// Calls row(window, columns, t, h) for every row of outputs of the tile with its source staged.
template <typename Element, typename T, typename Row>
inline void over_rows(const Conv& conv, const Tile& tile, const T* x, float* scratch, Row row) {
  Window<Element> window(conv, tile.row, tile.row_end, scratch);
  const ColumnTaps columns(conv, window);
  for (int64_t t = tile.frame; t < tile.frame_end; ++t) {
    window.reach(x + tile.batch * conv.source_size(), t);
    for (int64_t h = tile.row; h < tile.row_end; ++h) row(window, columns, t, h);
  }
}

}  // namespace emu3::EMU3_LEVEL
