#include "swiglu.h"

#include "simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// out = gate * sigmoid(gate) * up.
inline Pair forward_pair(Pair gate, Pair up) {
  return {gate.a * sigmoid(gate.a) * up.a, gate.b * sigmoid(gate.b) * up.b};
}

template <typename T, bool kPastCaches>
void forward_row(const T* gate, const T* up, T* out, int64_t width) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes)
    store_pair(out + c, forward_pair(load_pair(gate + c), load_pair(up + c)), kPastCaches);
  if (const int64_t tail = width - c)
    store_pair_tail(out + c, forward_pair(load_pair_tail(gate + c, tail), load_pair_tail(up + c, tail)), tail);
}

struct Gradient {
  Vec gate, up;
};

// dup = dout * silu(gate);  dgate = dout * up * silu'(gate).
inline Gradient gradient(Vec dout, Vec gate, Vec up) {
  const Vec s = sigmoid(gate);
  const Vec dout_s = dout * s;
  return {dout_s * up * fma(gate, 1.0f - s, splat(1)), dout_s * gate};
}

template <typename T, bool kPastCaches>
void backward_row(const T* dout, const T* gate, const T* up, T* dgate, T* dup, int64_t width) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) {
    const Pair d = load_pair(dout + c), g = load_pair(gate + c), u = load_pair(up + c);
    const Gradient a = gradient(d.a, g.a, u.a), b = gradient(d.b, g.b, u.b);
    store_pair(dgate + c, {a.gate, b.gate}, kPastCaches);
    store_pair(dup + c, {a.up, b.up}, kPastCaches);
  }
  if (const int64_t tail = width - c) {
    const Pair d = load_pair_tail(dout + c, tail), g = load_pair_tail(gate + c, tail);
    const Pair u = load_pair_tail(up + c, tail);
    const Gradient a = gradient(d.a, g.a, u.a), b = gradient(d.b, g.b, u.b);
    store_pair_tail(dgate + c, {a.gate, b.gate}, tail);
    store_pair_tail(dup + c, {a.up, b.up}, tail);
  }
}

template <typename T>
bool can_stream(const T* out, int64_t stride) {
  return aligned(out) && stride * sizeof(T) % 64 == 0;
}

template <typename T>
void forward_rows(const T* gate, const T* up, T* out, int64_t rows, int64_t width,
                  int64_t gate_stride, int64_t up_stride, int64_t out_stride, bool past_caches) {
  const auto row = past_caches && can_stream(out, out_stride) ? forward_row<T, true> : forward_row<T, false>;
  for (int64_t r = 0; r < rows; ++r)
    row(gate + r * gate_stride, up + r * up_stride, out + r * out_stride, width);
  stream_fence();
}

template <typename T>
void backward_rows(const T* dout, const T* gate, const T* up, T* dgate, T* dup, int64_t rows,
                   int64_t width, int64_t dout_stride, int64_t gate_stride, int64_t up_stride,
                   int64_t grad_stride, bool past_caches) {
  const bool past = past_caches && can_stream(dgate, grad_stride) && aligned(dup);
  const auto row = past ? backward_row<T, true> : backward_row<T, false>;
  for (int64_t r = 0; r < rows; ++r)
    row(dout + r * dout_stride, gate + r * gate_stride, up + r * up_stride, dgate + r * grad_stride,
        dup + r * grad_stride, width);
  stream_fence();
}

void forward(Dtype dtype, const void* gate, const void* up, void* out, int64_t rows, int64_t width,
             int64_t gate_stride, int64_t up_stride, int64_t out_stride, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    forward_rows((const T*)gate, (const T*)up, (T*)out, rows, width, gate_stride, up_stride,
                 out_stride, past_caches);
  });
}

void backward(Dtype dtype, const void* dout, const void* gate, const void* up, void* dgate,
              void* dup, int64_t rows, int64_t width, int64_t dout_stride, int64_t gate_stride,
              int64_t up_stride, int64_t grad_stride, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    backward_rows((const T*)dout, (const T*)gate, (const T*)up, (T*)dgate, (T*)dup, rows, width,
                  dout_stride, gate_stride, up_stride, grad_stride, past_caches);
  });
}

}  // namespace

extern const SwiGLU swiglu{forward, backward};

}  // namespace emu3::EMU3_LEVEL
