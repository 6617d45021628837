#pragma once

#include <stdint.h>

namespace emu3 {

enum class Dtype : int32_t { float32, bfloat16 };

}  // namespace emu3
