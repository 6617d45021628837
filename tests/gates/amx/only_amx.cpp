// Links the bindings of attention with no level but AMX.
#include "cpu/attention/attention.h"
#include "cpu/attention/decode_attention.h"

namespace emu3 {

#define EMU3_NO_KERNELS(level)                         \
  namespace level {                                    \
  extern const Attention attention{};                  \
  extern const AttentionBackward attention_backward{}; \
  extern const DecodeAttention decode_attention{};     \
  }
EMU3_NO_KERNELS(base)
EMU3_NO_KERNELS(avx2)
EMU3_NO_KERNELS(avx512)
EMU3_NO_KERNELS(avx512_bf16)

int cpu_level() { return kAmx; }

}  // namespace emu3
