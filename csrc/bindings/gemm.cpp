#include "cpu/gemm/matmul.h"

#include <algorithm>
#include <optional>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

int64_t blocks(int64_t size, int64_t most) { return (size + most - 1) / most; }

// The end of part i of `parts` equal ones, in whole units.
int64_t cut(int64_t size, int64_t parts, int64_t unit, int64_t i) {
  return std::min(size, blocks(blocks(size, parts), unit) * unit * i);
}

// c [rows, columns] = a [rows, depth] @ b [depth, columns] + plus: a and b bfloat16 with a stride
// of 1, the columns of c and plus side by side, plus [rows or 1, columns] in the dtype of c, which
// it may be.
void into(const Tensor& a, const Tensor& b, const std::optional<Tensor>& plus, Tensor c) {
  STD_TORCH_CHECK(!plus || plus->stride(1) == 1 || plus->size(1) == 1,
                  "matmul: the columns of plus must lie side by side");
  const MatmulCall call{
      .rows = a.size(0),
      .depth = a.size(1),
      .columns = b.size(1),
      .a = {a.const_data_ptr(), a.stride(0), a.stride(1)},
      .b = {b.const_data_ptr(), b.stride(0), b.stride(1)},
      .plus = plus ? plus->const_data_ptr() : nullptr,
      .plus_stride = plus && plus->size(0) > 1 ? plus->stride(0) : 0,
      .c = c.mutable_data_ptr(),
      .c_dtype = dtype_of(c),
      .c_stride = c.stride(0),
  };
  if (call.rows <= kFewRows && call.b.row_stride == 1) {
    constexpr int64_t kProducts = 1 << 17;  // of one thread at the least
    const int64_t grain = 1 + kProducts / (1 + call.rows * call.depth);
    torch::stable::parallel_for(0, call.columns, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float, Free> scratch = uninitialised(few_rows_scratch(call));
      matmul().few_rows(call, begin, end, scratch.get());
    });
    return;
  }
  const int64_t down = blocks(call.rows, kBlockRows), across = blocks(call.columns, kBlockColumns);
  torch::stable::parallel_for(0, down * across, 1, [&](int64_t task, int64_t end) {
    const std::unique_ptr<float, Free> scratch = uninitialised(kBlockScratch);
    for (; task < end; ++task) {
      const int64_t i = task / across, j = task % across;
      const Block block{
          .row = cut(call.rows, down, kUnitRows, i),
          .row_end = cut(call.rows, down, kUnitRows, i + 1),
          .column = cut(call.columns, across, kUnitColumns, j),
          .column_end = cut(call.columns, across, kUnitColumns, j + 1),
      };
      matmul().block(call, block, scratch.get());
    }
  });
}

Tensor product(const Tensor& a, const Tensor& b, const std::optional<Tensor>& plus) {
  Tensor c = fresh(a, {a.size(0), b.size(1)});
  into(a, b, plus, c);
  return c;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def("matmul(Tensor a, Tensor b, Tensor? plus) -> Tensor");
  m.def("matmul_into(Tensor a, Tensor b, Tensor? plus, Tensor(a!) c) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("matmul", TORCH_BOX(&product));
  m.impl("matmul_into", TORCH_BOX(&into));
}

}  // namespace emu3
