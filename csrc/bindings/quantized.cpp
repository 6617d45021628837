#include "cpu/quantized/quantized_linear.h"

#include <algorithm>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

// codes and scales are contiguous; int8 codes have a scale for each of their rows.
QuantizedWeight weight_of(const Tensor& codes, const Tensor& scales) {
  const bool is_int8 = codes.scalar_type() == torch::headeronly::ScalarType::Char;
  const int64_t K = codes.size(1) * (is_int8 ? 1 : 2);
  return {
      .K = K,
      .N = codes.size(0),
      .codes = codes.const_data_ptr(),
      .scales = scales.const_data_ptr(),
      .group = is_int8 ? 0 : K / scales.size(1),
  };
}

// y [M, N] = x [M, K] @ weight.T, for few rows of x, which has unit stride in K.
Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales) {
  const QuantizedWeight w = weight_of(codes, scales);
  const int64_t M = x.size(0), width = quantized_linear().packed_width(w);
  Tensor y = empty(x, {M, w.N});
  const Dtype dtype = dtype_of(x);
  const std::unique_ptr<float, Free> packed = uninitialised(std::max<int64_t>(1, M * width));
  for (int64_t m = 0, rows; m < M; m += rows) {
    rows = rows_at_once(M - m);
    for (int64_t r = 0; r < rows; ++r)
      quantized_linear().pack(w, dtype, at(x, (m + r) * x.stride(0)), r, rows,
                              packed.get() + m * width);
  }
  constexpr int64_t kMinMultiplyAdds = 1 << 18;  // of a thread
  const int64_t grain = 1 + kMinMultiplyAdds / (1 + M * w.K);
  const int64_t blocks = (w.N + kColumnBlock - 1) / kColumnBlock;
  void* const out = y.mutable_data_ptr();
  torch::stable::parallel_for(
      0, blocks, 1 + (grain - 1) / kColumnBlock, [&](int64_t begin, int64_t end) {
        quantized_linear().columns(w, dtype, packed.get(), M, begin * kColumnBlock,
                                   std::min(end * kColumnBlock, w.N), out);
      });
  return y;
}

// Rows [begin, begin + N) of the weight into `out` [N, K], contiguous.
void dequantize(const Tensor& codes, const Tensor& scales, int64_t begin, Tensor out) {
  const QuantizedWeight w = weight_of(codes, scales);
  const Dtype dtype = dtype_of(out);
  torch::stable::parallel_for(0, out.size(0), row_grain(w.K), [&](int64_t first, int64_t last) {
    quantized_linear().dequantize(w, dtype, begin + first, begin + last,
                                  mutable_at(out, first * w.K));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def("quantized_linear(Tensor x, Tensor codes, Tensor scales) -> Tensor");
  m.def("dequantize(Tensor codes, Tensor scales, int begin, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&linear));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace emu3
