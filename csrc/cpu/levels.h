// Which instruction set the kernels run with. Each cpu/<op>.cpp is compiled once per level and defines
// one table of functions in the namespace of that level; EMU3_KERNELS declares them, at_level() picks.
#pragma once

#if defined(__x86_64__)
#define EMU3_KERNELS(Table, name)  \
  namespace base {                 \
  extern const Table name;         \
  }                                \
  namespace avx2 {                 \
  extern const Table name;         \
  }                                \
  namespace avx512 {               \
  extern const Table name;         \
  }                                \
  inline const Table& name() {     \
    const int level = cpu_level(); \
    return level >= 2 ? avx512::name : level == 1 ? avx2::name : base::name; \
  }
#else
#define EMU3_KERNELS(Table, name) \
  namespace base {                \
  extern const Table name;        \
  }                               \
  inline const Table& name() { return base::name; }
#endif

namespace emu3 {

// 0 base, 1 avx2 (x86-64-v3), 2 avx512 (x86-64-v4), 3 amx (bfloat16 tiles, allowed by the kernel).
// No kernel holds AMX code yet: level 3 runs the tables of level 2.
int cpu_level();
int highest_cpu_level();
void set_cpu_level(int level);

}  // namespace emu3
