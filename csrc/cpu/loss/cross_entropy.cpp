#include "cpu/loss/cross_entropy.h"

#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int64_t kBlock =
    2048;  // elements: at most 8 KiB, so that the second pass reads the L1 cache

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

// Returns e^(x - m) / 2^log2_l. The difference comes first: it is small, and x may be huge.
inline Vec softmax(Vec x, float m, float log2_l) {
  return exp2(fma(x - m, splat(kLog2E), splat(-log2_l)));
}

template <typename T, bool kSum>
void add_block(PartialSums& sums, const T* logits, int64_t count) {
  const float m_old = sums.m;
  Pair m{splat(m_old), splat(m_old)}, all{};
  over_pairs(count, [&](int64_t c, int64_t n) {
    const Pair x = load_pair_or_lowest(logits + c, n);
    m = {max(m.a, x.a), max(m.b, x.b)};
    if (kSum) all = all + load_pair(logits + c, n);
  });
  const float m_new = reduce_max(max(m.a, m.b));
  Pair sum{};
  over_pairs(count, [&](int64_t c, int64_t n) {
    const Pair x = load_pair_or_lowest(logits + c, n);
    sum = sum + Pair{softmax(x.a, m_new, 0), softmax(x.b, m_new, 0)};
  });
  sums.l = sums.l * softmax(splat(m_old), m_new, 0)[0] + reduce_add(sum);
  sums.sum += reduce_add(all);
  sums.m = m_new;
}

// Blocks are counted from the first class, whatever its alignment, which therefore never changes a
// result.
template <typename T, bool kSum>
void add_row(const T* logits, int64_t classes, int64_t target, PartialSums& sums) {
  for (int64_t c = 0; c < classes; c += kBlock)
    add_block<T, kSum>(sums, logits + c, classes - c < kBlock ? classes - c : kBlock);
  if (0 <= target && target < classes) sums.target = to_float(logits[target]);
}

// Returns the number of elements before the first that starts a cache line.
template <typename T>
int64_t head(const T* row, int64_t count) {
  const int64_t elements = (64 - reinterpret_cast<uintptr_t>(row) % 64) % 64 / sizeof(T);
  return elements < count ? elements : count;
}

// dlogits = dloss * (softmax * (1 + 2 z lse) - (1 - s) * onehot - s / V).
template <typename T>
void backward_row(const T* logits, T* dlogits, int64_t classes, int64_t target,
                  Denominator denominator, float dloss, LossSettings settings, bool past_caches) {
  const auto [m, log2_l] = denominator;
  const float lse = m + kLn2 * log2_l;
  const Vec scale = splat(dloss * (1 + 2 * settings.z_loss * lse));
  const Vec spread = splat(-dloss * settings.label_smoothing / settings.num_classes);
  const auto gradient = [&](Vec x) { return fma(softmax(x, m, log2_l), scale, spread); };
  const bool has_target = 0 <= target && target < classes;
  const Vec target_logit =
      splat(has_target ? to_float(logits[target]) : 0);  // before it is overwritten
  const auto write_block = [&](int64_t from, int64_t count, bool past) {
    over_pairs(count, [&](int64_t c, int64_t n) {
      const Pair x = load_pair(logits + from + c, n);
      store_pair(dlogits + from + c, {gradient(x.a), gradient(x.b)}, n, past);
    });
  };
  const int64_t aligned = head(dlogits, classes);
  if (aligned) write_block(0, aligned, false);
  write_block(aligned, classes - aligned, past_caches);
  stream_fence();  // before the target is written a second time
  if (!has_target) return;
  const float onehot = dloss * (1 - settings.label_smoothing);
  store_tail(dlogits + target, gradient(target_logit) - onehot, 1);
}

void add(Dtype dtype, const void* logits, int64_t classes, int64_t target, LossSettings settings,
         PartialSums* sums) {
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
