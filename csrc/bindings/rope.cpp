#include "cpu/rope/rope.h"

#include <optional>
#include <tuple>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

void check_inside(const char* op, const char* name, int64_t index, int64_t stop) {
  check(0 <= index && index < stop, op, ": ", name, " must lie in [0, ", stop, "), got ", index);
}

// Checks that every index [B, T] is in [0, stop).
Indices checked(const char* op, const char* name, const Tensor& indices, int64_t stop) {
  const Indices view{static_cast<const int64_t*>(indices.const_data_ptr()), indices.stride(0),
                     indices.stride(1)};
  for (int64_t b = 0; b < indices.size(0); ++b)
    for (int64_t t = 0; t < indices.size(1); ++t)
      check_inside(op, name, view.data[b * view.batch_stride + t * view.token_stride], stop);
  return view;
}

Heads heads(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

Rotated rotated(const Tensor& from, const Tensor& to) {
  const bool in_place = from.const_data_ptr() == to.const_data_ptr();
  return {heads(from), heads(to), from.size(2), past_caches(to) && !in_place};
}

Tensor with_unit_stride(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// q [B, T, H, K], k and v [B, T, KV heads, K], tables [max_T, K/2].
void run(const Tensor& q, const Tensor& cos_table, const Tensor& sin_table, RopeCall call) {
  const Tensor cos = with_unit_stride(cos_table), sin = with_unit_stride(sin_table);
  call.dtype = dtype_of(q);
  call.tokens = q.size(1);
  call.head_dim = q.size(3);
  call.cos = static_cast<const float*>(cos.const_data_ptr());
  call.sin = static_cast<const float*>(sin.const_data_ptr());
  call.cos_stride = cos.stride(0);
  call.sin_stride = sin.stride(0);
  const int64_t heads = call.q.heads + call.k.heads + call.v.heads;
  torch::stable::parallel_for(0, q.size(0) * call.tokens, row_grain(heads * call.head_dim),
                              [&](int64_t begin, int64_t end) { rope().rotate(call, begin, end); });
}

void rotate_into(const Tensor& some_q, const Tensor& some_k, const Tensor& cos, const Tensor& sin,
                 const std::optional<Tensor>& positions, bool inverse, const Tensor& q_out,
                 const Tensor& k_out) {
  const Tensor q = with_unit_stride(some_q), k = with_unit_stride(some_k);
  RopeCall call{.inverse = inverse, .q = rotated(q, q_out), .k = rotated(k, k_out)};
  if (positions) {
    call.positions = checked("rope", "positions", *positions, cos.size(0));
  } else if (q.size(1)) {
    check_inside("rope", "positions", q.size(1) - 1, cos.size(0));
  }
  run(q, cos, sin, call);
}

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Tensor& k, const Tensor& cos,
                                  const Tensor& sin, const std::optional<Tensor>& positions,
                                  bool inverse) {
  const Tensor q_out = empty(q, q.sizes()), k_out = empty(k, k.sizes());
  rotate_into(q, k, cos, sin, positions, inverse, q_out, k_out);
  return {q_out, k_out};
}

// Outputs have unit stride in K, here and below.
void rotate_out(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                const std::optional<Tensor>& positions, const Tensor& q_out, const Tensor& k_out) {
  rotate_into(q, k, cos, sin, positions, false, q_out, k_out);
}

Tensor append(const Tensor& some_q, const Tensor& some_k, const Tensor& some_v, const Tensor& cos,
              const Tensor& sin, const Tensor& key_cache, const Tensor& value_cache,
              const Tensor& slots, const Tensor& positions) {
  const Tensor q = with_unit_stride(some_q), k = with_unit_stride(some_k);
  const Tensor v = with_unit_stride(some_v), q_out = empty(q, q.sizes());
  RopeCall call{
      .positions = checked("rope_append", "positions", positions, cos.size(0)),
      .slots = checked("rope_append", "slots", slots, key_cache.size(1)),
      .q = rotated(q, q_out),
      .k = rotated(k, key_cache),
      .v = rotated(v, value_cache),
  };
  call.k.past_caches = false;  // attention reads them next
  run(q, cos, sin, call);
  return q_out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool inverse) -> "
      "(Tensor, Tensor)");
  m.def(
      "rope_out(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, Tensor(a!) q_out, "
      "Tensor(b!) k_out) -> ()");
  m.def(
      "rope_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) key_cache, "
      "Tensor(b!) value_cache, Tensor slots, Tensor positions) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("rope", TORCH_BOX(&rotate));
  m.impl("rope_out", TORCH_BOX(&rotate_out));
  m.impl("rope_append", TORCH_BOX(&append));
}

}  // namespace emu3
