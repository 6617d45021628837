// The instruction-set level of the kernels. Each cpu/<family>/<op>.cpp is compiled once per level
// and defines one table of functions in the namespace of that level. EMU3_KERNELS declares the
// tables and a function that returns the one of the current level. Only kernels with AMX tiles have
// a table for kAmx; at that level the others run the table of avx512_bf16.
#pragma once

namespace emu3 {

enum Level { kBase, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// kAvx2 is x86-64-v3, kAvx512 is x86-64-v4, kAvx512Bf16 adds AVX512-BF16, and kAmx adds AMX-BF16
// where the operating system permits it.
int cpu_level();
int highest_cpu_level();
void set_cpu_level(int level);

}  // namespace emu3

// kAmx runs the table of level `last`.
#define EMU3_TABLES(Table, name, last)                                                  \
  namespace base {                                                                      \
  extern const Table name;                                                              \
  }                                                                                     \
  namespace avx2 {                                                                      \
  extern const Table name;                                                              \
  }                                                                                     \
  namespace avx512 {                                                                    \
  extern const Table name;                                                              \
  }                                                                                     \
  namespace avx512_bf16 {                                                               \
  extern const Table name;                                                              \
  }                                                                                     \
  namespace last {                                                                      \
  extern const Table name;                                                              \
  }                                                                                     \
  inline const Table& name() {                                                          \
    static constexpr const Table* kTables[] = {&base::name, &avx2::name, &avx512::name, \
                                               &avx512_bf16::name, &last::name};        \
    return *kTables[cpu_level()];                                                       \
  }
#if defined(__x86_64__)
#define EMU3_KERNELS(Table, name) EMU3_TABLES(Table, name, avx512_bf16)
#define EMU3_KERNELS_WITH_AMX(Table, name) EMU3_TABLES(Table, name, amx)
#else
#define EMU3_KERNELS(Table, name) \
  namespace base {                \
  extern const Table name;        \
  }                               \
  inline const Table& name() { return base::name; }
#define EMU3_KERNELS_WITH_AMX EMU3_KERNELS
#endif
