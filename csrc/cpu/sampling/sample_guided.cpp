#include "cpu/sampling/sample_guided.h"

#include "cpu/sampling/gumbel.h"
#include "cpu/sampling/radix_select.h"

namespace emu3::EMU3_LEVEL {
namespace {

constexpr float kLargest = 3.40282347e38f, kLog2E = 1.44269504f;

// The first `count` of 16 elements; the rest is zero.
template <typename T>
Floats load_first(const T* from, int64_t count) {
  T block[16] = {};
  if (count < 16) {
    __builtin_memcpy(block, from, count * sizeof *from);
    from = block;
  }
  return each([&](int p) { return load(from + p * kLanes); });
}

// Writes the keys of the guided logits and the ids, and returns the largest key.
template <typename T>
int32_t write_keys(const T* cond, const T* uncond, int64_t count, float guidance, int32_t* keys,
                   int32_t* ids) {
  IntVec largest = kAbsent - IntVec{};
  Ints id = load16(kLane);
  for (int64_t i = 0; i < count; i += 16) {
    Floats z = load_first(cond + i, count - i);
    if (uncond) {
      const Floats base = load_first(uncond + i, count - i);
      z = base + splat16(guidance) * (z - base);
    }
    z = min(splat16(kLargest), max(splat16(-kLargest), z));  // NaN stays
    Ints key;
    for (int p = 0; p < kParts; ++p) key.part[p] = key_of(z.part[p]);
    if (count - i < 16) key = first_of(key, static_cast<int>(count - i), kAbsent);
    for (int p = 0; p < kParts; ++p) largest = key.part[p] > largest ? key.part[p] : largest;
    store16(keys + i, key);
    store16(ids + i, id);
    id = id + splat16(16);
  }
  int32_t all = kAbsent;
  for (int j = 0; j < kLanes; ++j) all = largest[j] > all ? largest[j] : all;
  return all;
}

int64_t keep_top_k(int32_t* keys, int32_t* ids, int64_t count, int64_t top_k, int32_t* packed) {
  if (top_k >= count) return count;
  const auto ones = [](const int32_t*, uint64_t* weight) {
    for (int j = 0; j < 16; ++j) weight[j] = 1;
  };
  const auto enough = [&](uint64_t number) { return number >= (uint64_t)top_k; };
  return keep(keys, ids, count, radix_select(keys, count, packed, ones, enough));
}

// The softmax mass is counted in units of 2^-40 of that of the largest logit.
int64_t keep_top_p(int32_t* keys, int32_t* ids, int64_t count, double top_p, float temperature,
                   float highest, int32_t* packed) {
  if (top_p >= 1) return count;
  const auto masses = [&](const int32_t* from, uint64_t* weight) {
    const Ints key = load16(from);
    float w[16];
    store16(w, each([&](int p) {
              return exp2((float_of(key.part[p]) - highest) / temperature * kLog2E) * 0x1p40f;
            }));
    for (int j = 0; j < 16; ++j) weight[j] = (uint64_t)(int64_t)w[j];
  };
  uint64_t total = 0;
  for (int64_t i = 0; i < count; i += 16) {
    uint64_t weight[16];
    masses(keys + i, weight);
    for (int j = 0; j < 16 && i + j < count; ++j) total += weight[j];
  }
  const auto enough = [&](uint64_t mass) {
    return (float)((double)mass / (double)total) >= (float)top_p;
  };
  return keep(keys, ids, count, radix_select(keys, count, packed, masses, enough));
}

void write_scores(const int32_t* keys, const int32_t* ids, int64_t count, uint64_t seed,
                  int64_t place, float temperature, float highest, float* scores) {
  for (int64_t i = 0; i < count; i += 16) {
    const Ints key = load16(keys + i), id = load16(ids + i);
    store16(scores + i, each([&](int p) {
              const Vec below = (float_of(key.part[p]) - highest) / temperature;
              return below + gumbel_of(words_of(seed, place, id.part[p]));
            }));
  }
}

// Writes the ids of the `num` greatest scores in order, of equal ones the first, then -1. `best`
// gets their scores; it has room for min(count, num).
void write_best(const float* scores, const int32_t* ids, int64_t count, int64_t num, float* best,
                int64_t* codes) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (found == num && !(scores[i] > best[num - 1])) continue;
    int64_t at = found < num ? found++ : num - 1;
    for (; at > 0 && best[at - 1] < scores[i]; --at)
      best[at] = best[at - 1], codes[at] = codes[at - 1];
    best[at] = scores[i], codes[at] = ids[i];
  }
  for (; found < num; ++found) codes[found] = -1;
}

void row(Dtype dtype, const void* cond, const void* uncond, int64_t num_codes, uint64_t seed,
         int64_t place, SampleSettings settings, int32_t* scratch, int64_t* codes) {
  const int64_t stride = sample_guided_stride(num_codes);
  int32_t *keys = scratch, *ids = keys + stride, *packed = ids + stride;
  int32_t largest = kNaN;
  if (place >= 0) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      largest =
          write_keys((const T*)cond, (const T*)uncond, num_codes, settings.guidance, keys, ids);
    });
  }
  const float highest = float_of(largest);
  int64_t count = largest == kNaN ? 0 : num_codes;
  count = keep_top_k(keys, ids, count, settings.top_k, packed);
  count = keep_top_p(keys, ids, count, settings.top_p, settings.temperature, highest, packed);
  float *scores = (float*)packed, *best = (float*)keys;
  write_scores(keys, ids, count, seed, place, settings.temperature, highest, scores);
  write_best(scores, ids, count, settings.num, best, codes);
}

}  // namespace

extern const SampleGuided sample_guided{row};

}  // namespace emu3::EMU3_LEVEL
