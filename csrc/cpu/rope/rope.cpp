#include "cpu/rope/rope.h"

#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// Returns entries of a table in the order of load_pair() of the dtype of the heads.
inline Pair in_order(const float*, Pair entries) { return entries; }

inline Pair in_order(const bfloat16*, Pair entries) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {
      _mm512_permutex2var_ps(entries.a, even, entries.b),
      _mm512_permutex2var_ps(entries.a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), entries.b)};
#else
  float x[kPair], even[kLanes], odd[kLanes];
  store_pair(x, entries, false);
  for (int i = 0; i < kLanes; ++i) even[i] = x[2 * i], odd[i] = x[2 * i + 1];
  return {load(even), load(odd)};
#endif
}

// cos and sin of one token in the order of the elements of a head: loaded once for all heads.
template <typename T>
struct Rotation {
  static constexpr int64_t kMaxElements = 64 * kPair;  // elements of half a head
  Pair cos[kMaxElements / kPair], sin[kMaxElements / kPair];

  Rotation(const float* cosines, const float* sines, int64_t half, bool inverse) {
    const float sign = inverse ? -1.0f : 1.0f;
    over_pairs(half, [&](int64_t c, int64_t count) {
      cos[c / kPair] = in_order((const T*)nullptr, load_pair(cosines + c, count));
      sin[c / kPair] = in_order((const T*)nullptr, load_pair(sines + c, count)) * sign;
    });
  }
};

template <typename T>
inline T* token_of(const Heads& x, int64_t batch, int64_t token) {
  return (T*)x.data + batch * x.batch_stride + token * x.token_stride;
}

// Rotates n elements of the first half of a head with n of the second.
template <typename T>
inline void rotate_pair(const T* from, T* to, int64_t half, int64_t n, Pair cos, Pair sin,
                        bool past_caches) {
  const Pair a = load_pair(from, n), b = load_pair(from + half, n);
  store_pair(to, fma(b * -1.0f, sin, a * cos), n, past_caches);
  store_pair(to + half, fma(a, sin, b * cos), n, past_caches);
}

// Rotates elements [first, first + count) of both halves of every head.
template <typename T>
void rotate_heads(const Rotated& x, const T* from, T* to, int64_t half, int64_t first,
                  int64_t count, const Rotation<T>& rotation) {
  for (int64_t head = 0; head < x.heads; ++head) {
    over_pairs(count, [&](int64_t i, int64_t n) {
      rotate_pair(from + first + i, to + first + i, half, n, rotation.cos[i / kPair],
                  rotation.sin[i / kPair], x.past_caches);
    });
    from += x.from.head_stride, to += x.to.head_stride;
  }
}

// Pairs of half a head of Emu3 (head_dim 128) in AVX-512: few enough to keep the rotation in
// registers.
constexpr int kFew = 2;

template <bool kPastCaches, typename T>
void rotate_small_heads(const Rotated& x, const T* from, T* to, const Rotation<T>& rotation) {
  Pair cos[kFew], sin[kFew];
  for (int i = 0; i < kFew; ++i) cos[i] = rotation.cos[i], sin[i] = rotation.sin[i];
  for (int64_t head = 0; head < x.heads; ++head) {
    for (int i = 0; i < kFew; ++i)
      rotate_pair(from + i * kPair, to + i * kPair, kFew * kPair, kPair, cos[i], sin[i],
                  kPastCaches);
    from += x.from.head_stride, to += x.to.head_stride;
  }
}

template <typename T>
void rotate_token(const Rotated& x, const T* from, T* to, int64_t half, int64_t first,
                  int64_t count, const Rotation<T>& rotation) {
  if (half != kFew * kPair) return rotate_heads(x, from, to, half, first, count, rotation);
  if (x.past_caches) return rotate_small_heads<true>(x, from, to, rotation);
  rotate_small_heads<false>(x, from, to, rotation);
}

template <typename T>
void copy_heads(const Rotated& x, const T* from, T* to, int64_t head_dim) {
  for (int64_t head = 0; head < x.heads; ++head) {
    __builtin_memcpy(to, from, head_dim * sizeof(T));
    from += x.from.head_stride, to += x.to.head_stride;
  }
}

// Streaming stores of less than a cache line would be slow.
template <typename T>
bool may_stream(const Rotated& x, int64_t half) {
  const int64_t strides = x.to.batch_stride | x.to.token_stride | x.to.head_stride;
  return x.past_caches && kPair * sizeof(T) >= 64 && can_stream((T*)x.to.data, strides | half);
}

inline int64_t index_of(const Indices& indices, int64_t batch, int64_t token) {
  if (!indices.data) return token;
  return indices.data[batch * indices.batch_stride + token * indices.token_stride];
}

template <typename T>
void rotate_tokens(RopeCall call, int64_t begin, int64_t end) {
  const int64_t half = call.head_dim / 2;
  call.q.past_caches = may_stream<T>(call.q, half);
  call.k.past_caches = may_stream<T>(call.k, half);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / call.tokens, token = i % call.tokens;
    const int64_t position = index_of(call.positions, batch, token);
    const int64_t slot = index_of(call.slots, batch, token);
    const float* const cos = call.cos + position * call.cos_stride;
    const float* const sin = call.sin + position * call.sin_stride;
    const T* const q = token_of<T>(call.q.from, batch, token);
    const T* const k = token_of<T>(call.k.from, batch, token);
    T* const q_to = token_of<T>(call.q.to, batch, token);
    T* const k_to = token_of<T>(call.k.to, batch, slot);
    for (int64_t first = 0; first < half; first += Rotation<T>::kMaxElements) {
      const int64_t count =
          half - first < Rotation<T>::kMaxElements ? half - first : Rotation<T>::kMaxElements;
      const Rotation<T> rotation(cos + first, sin + first, count, call.inverse);
      rotate_token<T>(call.q, q, q_to, half, first, count, rotation);
      rotate_token<T>(call.k, k, k_to, half, first, count, rotation);
    }
    if (call.v.heads)
      copy_heads<T>(call.v, token_of<T>(call.v.from, batch, token),
                    token_of<T>(call.v.to, batch, slot), call.head_dim);
  }
}

void rotate(const RopeCall& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto type) { rotate_tokens<decltype(type)>(call, begin, end); });
  stream_fence();
}

}  // namespace

extern const Rope rope{rotate};

}  // namespace emu3::EMU3_LEVEL
