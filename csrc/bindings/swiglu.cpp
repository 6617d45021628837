#include "cpu/swiglu/swiglu.h"

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

// gate, up [rows, width], unit stride in the channels.
Tensor forward(const Tensor& gate, const Tensor& up) {
  const int64_t rows = gate.size(0), width = gate.size(1);
  Tensor out = empty(gate, {rows, width});
  const Dtype dtype = dtype_of(gate);
  const bool past = past_caches(out);
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    swiglu().forward(dtype, at(gate, begin * gate.stride(0)), at(up, begin * up.stride(0)),
                     mutable_at(out, begin * width), end - begin, width, gate.stride(0),
                     up.stride(0), past);
  });
  return out;
}

// Both gradients in one packed [rows, 2 * width].
Tensor backward(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  const int64_t rows = gate.size(0), width = gate.size(1), packed = 2 * width;
  Tensor dgate_up = empty(gate, {rows, packed});
  const Dtype dtype = dtype_of(gate);
  const bool past = past_caches(dgate_up);
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    swiglu().backward(dtype, at(dout, begin * dout.stride(0)), at(gate, begin * gate.stride(0)),
                      at(up, begin * up.stride(0)), mutable_at(dgate_up, begin * packed),
                      mutable_at(dgate_up, begin * packed + width), end - begin, width,
                      dout.stride(0), gate.stride(0), up.stride(0), packed, past);
  });
  return dgate_up;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def("swiglu_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("swiglu_forward", TORCH_BOX(&forward));
  m.impl("swiglu_backward", TORCH_BOX(&backward));
}

}  // namespace emu3
