#include "cpu/loss/cross_entropy.h"

#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int64_t kBlock = 2048;  // at most 8 KiB: still in the L1 cache when it is read again

inline float lowest(float) { return -__builtin_inff(); }
inline bfloat16 lowest(bfloat16) { return {0xff80}; }

// The first `count` <= kPair elements, -infinity in place of the rest.
template <typename T>
inline Pair load_pair_or_lowest(const T* from, int64_t count) {
  if (count == kPair) return load_pair(from);
  T block[kPair];
  for (T& x : block) x = lowest(T{});
  __builtin_memcpy(block, from, count * sizeof *from);
  return load_pair(block);
}

// e^(x - highest) / 2^log2_sum. The difference comes first: it is small, and x may be huge.
inline Vec softmax(Vec x, float highest, float log2_sum) {
  return exp2(fma(x - highest, splat(kLog2E), splat(-log2_sum)));
}

template <typename T, bool kTotal>
void add_block(Sums& sums, const T* logits, int64_t count) {
  const float before = sums.highest;
  Pair highest{splat(before), splat(before)}, total{};
  over_pairs(count, [&](int64_t c, int64_t n) {
    const Pair x = load_pair_or_lowest(logits + c, n);
    highest = {max(highest.a, x.a), max(highest.b, x.b)};
    if (kTotal) total = total + load_pair(logits + c, n);
  });
  const float top = reduce_max(max(highest.a, highest.b));
  Pair sum{};
  over_pairs(count, [&](int64_t c, int64_t n) {
    const Pair x = load_pair_or_lowest(logits + c, n);
    sum = sum + Pair{softmax(x.a, top, 0), softmax(x.b, top, 0)};
  });
  sums.sum = sums.sum * softmax(splat(before), top, 0)[0] + reduce_add(sum);
  sums.total += reduce_add(total);
  sums.highest = top;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return widen(HalfVec{} + x.bits)[0]; }

// Blocks begin at the first class wherever that lies, so that alignment never changes a result.
template <typename T, bool kTotal>
void add_row(const T* logits, int64_t classes, int64_t target, Sums& sums) {
  for (int64_t c = 0; c < classes; c += kBlock)
    add_block<T, kTotal>(sums, logits + c, classes - c < kBlock ? classes - c : kBlock);
  if (0 <= target && target < classes) sums.target = to_float(logits[target]);
}

// Elements before the first that begins a cache line: rows of an odd width start anywhere.
template <typename T>
int64_t head(const T* row, int64_t count) {
  const int64_t elements = (64 - reinterpret_cast<uintptr_t>(row) % 64) % 64 / sizeof(T);
  return elements < count ? elements : count;
}

// dlogits = dloss * (softmax * (1 + 2 z lse) - (1 - s) * onehot - s / V).
template <typename T>
void backward_row(const T* logits, T* dlogits, int64_t classes, int64_t target,
                  Denominator denominator, float dloss, LossSettings settings, bool past_caches) {
  const auto [highest, log2_sum] = denominator;
  const float lse = highest + kLn2 * log2_sum;
  const Vec scale = splat(dloss * (1 + 2 * settings.z_loss * lse));
  const Vec spread = splat(-dloss * settings.label_smoothing / settings.num_classes);
  const auto gradient = [&](Vec x) { return fma(softmax(x, highest, log2_sum), scale, spread); };
  const bool has_target = 0 <= target && target < classes;
  const Vec target_logit = splat(has_target ? to_float(logits[target]) : 0);  // before it is lost
  const auto write_block = [&](int64_t from, int64_t count, bool past) {
    over_pairs(count, [&](int64_t c, int64_t n) {
      const Pair x = load_pair(logits + from + c, n);
      store_pair(dlogits + from + c, {gradient(x.a), gradient(x.b)}, n, past);
    });
  };
  const int64_t aligned = head(dlogits, classes);
  if (aligned) write_block(0, aligned, false);
  write_block(aligned, classes - aligned, past_caches);
  stream_fence();  // before the one class that is written twice
  if (!has_target) return;
  const float onehot = dloss * (1 - settings.label_smoothing);
  store_tail(dlogits + target, gradient(target_logit) - onehot, 1);
}

void add(Dtype dtype, const void* logits, int64_t classes, int64_t target, LossSettings settings,
         Sums* sums) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto row = settings.label_smoothing ? add_row<T, true> : add_row<T, false>;
    row((const T*)logits, classes, target, *sums);
  });
}

void backward(Dtype dtype, const void* logits, void* dlogits, int64_t classes, int64_t target,
              Denominator denominator, float dloss, LossSettings settings, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    backward_row((const T*)logits, (T*)dlogits, classes, target, denominator, dloss, settings,
                 past_caches);
  });
}

}  // namespace

extern const CrossEntropy cross_entropy{add, backward};

}  // namespace emu3::EMU3_LEVEL
