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

template <typename T>
void rotate_token(const RopeCall& call, const Heads& x, int64_t batch, int64_t token,
                  const float* cos, const float* sin, bool past_caches) {
  const int64_t half = call.width / 2;
  const T* const from = (const T*)x.from + batch * x.batch_stride + token * x.token_stride;
  T* const to = (T*)x.to + (batch * call.tokens + token) * x.heads * call.width;
  over_pairs(half, [&](int64_t c, int64_t count) {
    const Pair cosine = in_order((const T*)nullptr, load_pair(cos + c, count));
    const Pair sine = in_order((const T*)nullptr, load_pair(sin + c, count)) * (call.inverse ? -1.0f : 1.0f);
    const T* first = from + c;
    T* out = to + c;
    for (int64_t head = 0; head < x.heads; ++head, first += x.head_stride, out += call.width) {
      const Pair a = load_pair(first, count), b = load_pair(first + half, count);
      store_pair(out, fma(a, cosine, b * sine * -1.0f), count, past_caches);
      store_pair(out + half, fma(b, cosine, a * sine), count, past_caches);
    }
  });
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
    rotate_token<T>(call, call.q, batch, token, cos, sin, past_q);
    rotate_token<T>(call, call.k, batch, token, cos, sin, past_k);
  }
}

void rotate(const RopeCall& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto type) { rotate_tokens<decltype(type)>(call, begin, end); });
  stream_fence();
}

}  // namespace

extern const Rope rope{rotate};

}  // namespace emu3::EMU3_LEVEL
