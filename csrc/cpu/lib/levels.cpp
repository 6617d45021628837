// Detects once which level the processor and the operating system support.
#include "cpu/lib/levels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace emu3 {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

// Linux permits tiles, 8 KiB of state, on request only (arch_prctl, ARCH_REQ_XCOMP_PERM).
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

int supported_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!has_avx2()) return kBase;
  if (!has_avx512()) return kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
  return has_amx() ? kAmx : kAvx512Bf16;
#else
  return kBase;
#endif
}

int initial_level() {
  const char* asked = std::getenv("EMU3_CPU_LEVEL");
  const char* const names[] = {"base", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int level = 0; asked && level < highest_cpu_level(); ++level)
    if (!std::strcmp(asked, names[level])) return level;
  return highest_cpu_level();
}

std::atomic<int>& current() {
  static std::atomic<int> level{initial_level()};
  return level;
}

}  // namespace

int highest_cpu_level() {
  static const int level = supported_level();
  return level;
}

int cpu_level() { return current().load(std::memory_order_relaxed); }

void set_cpu_level(int level) { current().store(level, std::memory_order_relaxed); }

}  // namespace emu3
