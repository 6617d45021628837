#include "rope.h"

#include "simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// Entries of a table in the order in which load_pair() delivers elements of the heads' type.
inline Pair in_order(const float*, Pair entries) { return entries; }

inline Pair in_order(const bfloat16*, Pair entries) {
  float x[kPair], even[kLanes], odd[kLanes];
  store_pair(x, entries, false);
  for (int i = 0; i < kLanes; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
  return {load(even), load(odd)};
}

// The rotation of one token, in the order of the heads' elements: read once, used for every head.
template <typename T>
struct Rotation {
  static constexpr int64_t kMost = 64 * kPair;  // elements of half a head that it holds
  Pair cos[kMost / kPair], sin[kMost / kPair];

  Rotation(const float* cosines, const float* sines, int64_t half, bool inverse) {
    over_pairs(half, [&](int64_t c, int64_t count) {
      cos[c / kPair] = in_order((const T*)nullptr, load_pair(cosines + c, count));
      sin[c / kPair] =
          in_order((const T*)nullptr, load_pair(sines + c, count)) * (inverse ? -1.0f : 1.0f);
    });
  }
};

template <typename T>
void rotate_heads(const Heads& x, const T* from, T* to, int64_t width, int64_t first, int64_t count,
                  const Rotation<T>& rotation, bool past_caches) {
  const int64_t half = width / 2;
  for (int64_t head = 0; head < x.heads; ++head, from += x.head_stride, to += width)
    over_pairs(count, [&](int64_t i, int64_t n) {
      const Pair cos = rotation.cos[i / kPair], sin = rotation.sin[i / kPair];
      const int64_t c = first + i;
      const Pair a = load_pair(from + c, n), b = load_pair(from + half + c, n);
      store_pair(to + c, fma(a, cos, b * sin * -1.0f), n, past_caches);
      store_pair(to + half + c, fma(b, cos, a * sin), n, past_caches);
    });
}

template <typename T>
void rotate_token(const RopeCall& call, int64_t batch, int64_t token, const float* cos,
                  const float* sin, bool past_q, bool past_k) {
  const int64_t half = call.width / 2, row = batch * call.tokens + token;
  for (int64_t first = 0; first < half; first += Rotation<T>::kMost) {
    const int64_t count = half - first < Rotation<T>::kMost ? half - first : Rotation<T>::kMost;
    const Rotation<T> rotation(cos + first, sin + first, count, call.inverse);
    const auto rotate = [&](const Heads& x, bool past_caches) {
      const T* from = (const T*)x.from + batch * x.batch_stride + token * x.token_stride;
      T* to = (T*)x.to + row * x.heads * call.width;
      rotate_heads<T>(x, from, to, call.width, first, count, rotation, past_caches);
    };
    rotate(call.q, past_q);
    rotate(call.k, past_k);
  }
}

template <typename T>
void rotate_tokens(const RopeCall& call, int64_t begin, int64_t end) {
  // A block that is less than a cache line would leave half a line behind for the next block.
  const bool lines = call.past_caches && kPair * sizeof(T) >= 64;
  const bool past_q = lines && can_stream((T*)call.q.to, call.width / 2);
  const bool past_k = lines && can_stream((T*)call.k.to, call.width / 2);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / call.tokens, token = i % call.tokens;
    const int64_t position = call.positions ? call.positions[batch * call.positions_batch_stride +
                                                             token * call.positions_token_stride]
                                            : token;
    const float* const cos = call.cos + position * call.cos_stride;
    const float* const sin = call.sin + position * call.sin_stride;
    rotate_token<T>(call, batch, token, cos, sin, past_q, past_k);
  }
}

void rotate(const RopeCall& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto type) { rotate_tokens<decltype(type)>(call, begin, end); });
  stream_fence();
}

}  // namespace

extern const Rope rope{rotate};

}  // namespace emu3::EMU3_LEVEL
