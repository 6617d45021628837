#include "cpu/gemm/matmul.h"

#include <algorithm>
#include <optional>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

int64_t ceil_div(int64_t size, int64_t most) { return (size + most - 1) / most; }

// Returns the end of part i - 1 of `parts` equal parts of `size`, a multiple of `unit`.
int64_t part_end(int64_t size, int64_t parts, int64_t unit, int64_t i) {
  return std::min(size, ceil_div(ceil_div(size, parts), unit) * unit * i);
}

// C [M, N] = A [M, K] @ B [K, N] + plus. A and B are bfloat16 and have unit stride in one
// dimension; C and plus [M or 1, N] share a dtype and have unit stride in N. plus may be C.
void matmul_into(const Tensor& a, const Tensor& b, const std::optional<Tensor>& plus, Tensor c) {
  STD_TORCH_CHECK(!plus || plus->stride(1) == 1 || plus->size(1) == 1,
                  "matmul: plus must have unit stride in N");
  const MatmulCall call{
      .M = a.size(0),
      .K = a.size(1),
      .N = b.size(1),
      .a = {a.const_data_ptr(), a.stride(0), a.stride(1)},
      .b = {b.const_data_ptr(), b.stride(0), b.stride(1)},
      .plus = plus ? plus->const_data_ptr() : nullptr,
      .plus_stride = plus && plus->size(0) > 1 ? plus->stride(0) : 0,
      .c = c.mutable_data_ptr(),
      .c_dtype = dtype_of(c),
      .c_stride = c.stride(0),
  };
  if (call.M <= kSmallM && call.b.row_stride == 1) {
    constexpr int64_t kMinMultiplyAdds = 1 << 17;  // of a thread
    const int64_t grain = 1 + kMinMultiplyAdds / (1 + call.M * call.K);
    torch::stable::parallel_for(0, call.N, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float, Free> scratch = uninitialised(small_m_scratch(call));
      matmul().small_m(call, begin, end, scratch.get());
    });
    return;
  }
  const int64_t down = ceil_div(call.M, kMC), across = ceil_div(call.N, kNC);
  torch::stable::parallel_for(0, down * across, 1, [&](int64_t task, int64_t end) {
    const std::unique_ptr<float, Free> scratch = uninitialised(kBlockScratch);
    for (; task < end; ++task) {
      const int64_t i = task / across, j = task % across;
      const Block block{
          .row = part_end(call.M, down, kMUnit, i),
          .row_end = part_end(call.M, down, kMUnit, i + 1),
          .column = part_end(call.N, across, kNUnit, j),
          .column_end = part_end(call.N, across, kNUnit, j + 1),
      };
      matmul().block(call, block, scratch.get());
    }
  });
}

Tensor matmul_new(const Tensor& a, const Tensor& b, const std::optional<Tensor>& plus) {
  Tensor c = empty(a, {a.size(0), b.size(1)});
  matmul_into(a, b, plus, c);
  return c;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def("matmul(Tensor a, Tensor b, Tensor? plus) -> Tensor");
  m.def("matmul_into(Tensor a, Tensor b, Tensor? plus, Tensor(a!) c) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("matmul", TORCH_BOX(&matmul_new));
  m.impl("matmul_into", TORCH_BOX(&matmul_into));
}

}  // namespace emu3
