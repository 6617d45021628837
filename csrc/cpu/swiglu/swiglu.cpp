#include "cpu/swiglu/swiglu.h"

#include "cpu/lib/silu.h"

namespace emu3::EMU3_LEVEL {
namespace {

template <typename T>
void forward_rows(const T* gate, const T* up, T* out, int64_t rows, int64_t width,
                  int64_t gate_stride, int64_t up_stride, bool past_caches) {
  for (int64_t r = 0; r < rows; ++r, gate += gate_stride, up += up_stride, out += width)
    over_pairs(width, [&](int64_t c, int64_t count) {
      const Pair y = silu(load_pair(gate + c, count)) * load_pair(up + c, count);
      store_pair(out + c, y, count, past_caches);
    });
}

struct Gradient {
  Vec gate, up;
};

// dup = dout * silu(gate);  dgate = dout * up * silu'(gate).
inline Gradient gradient(Vec dout, Vec gate, Vec up) {
  const Vec s = sigmoid(gate);
  const Vec dout_s = dout * s;
  gate = above_lowest(gate);
  return {dout_s * up * fma(gate, 1.0f - s, splat(1)), dout_s * gate};
}

template <typename T>
void backward_rows(const T* dout, const T* gate, const T* up, T* dgate, T* dup, int64_t rows,
                   int64_t width, int64_t dout_stride, int64_t gate_stride, int64_t up_stride,
                   int64_t grad_stride, bool past_caches) {
  for (int64_t r = 0; r < rows; ++r) {
    over_pairs(width, [&](int64_t c, int64_t count) {
      const Pair d = load_pair(dout + c, count), g = load_pair(gate + c, count);
      const Pair u = load_pair(up + c, count);
      const Gradient a = gradient(d.a, g.a, u.a), b = gradient(d.b, g.b, u.b);
      store_pair(dgate + c, {a.gate, b.gate}, count, past_caches);
      store_pair(dup + c, {a.up, b.up}, count, past_caches);
    });
    dout += dout_stride, gate += gate_stride, up += up_stride;
    dgate += grad_stride, dup += grad_stride;
  }
}

void forward(Dtype dtype, const void* gate, const void* up, void* out, int64_t rows, int64_t width,
             int64_t gate_stride, int64_t up_stride, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    forward_rows((const T*)gate, (const T*)up, (T*)out, rows, width, gate_stride, up_stride,
                 past_caches && can_stream((T*)out, width));
  });
  stream_fence();
}

void backward(Dtype dtype, const void* dout, const void* gate, const void* up, void* dgate,
              void* dup, int64_t rows, int64_t width, int64_t dout_stride, int64_t gate_stride,
              int64_t up_stride, int64_t grad_stride, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const bool past = past_caches && can_stream((T*)dgate, grad_stride) && can_stream((T*)dup, 0);
    backward_rows((const T*)dout, (const T*)gate, (const T*)up, (T*)dgate, (T*)dup, rows, width,
                  dout_stride, gate_stride, up_stride, grad_stride, past);
  });
  stream_fence();
}

}  // namespace

extern const SwiGLU swiglu{forward, backward};

}  // namespace emu3::EMU3_LEVEL
