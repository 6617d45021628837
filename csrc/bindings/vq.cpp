#include "cpu/vq/nearest_code.h"

#include <optional>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

// Building a tree costs as much as scanning all codes for 250 queries, and a query of it as much as
// scanning 800 codes (measured). Above 8 dimensions it seldom prunes.
bool tree_pays(int64_t num_queries, int64_t num_codes, int64_t dim) {
  return dim <= 8 && num_queries * (num_codes - 800) > 250 * num_codes;
}

constexpr int64_t kMinCodesOfTree = 512;
constexpr int kAllLevels = 31;

Tensor build_tree(const Tensor& codebook) {
  const int64_t num_codes = codebook.size(0);
  const int dim = static_cast<int>(codebook.size(1));
  const auto words = [&](int64_t count) {
    return empty(codebook, {count}, torch::headeronly::ScalarType::Int);
  };
  Tensor memory = words(code_tree_size(num_codes, dim));
  Tensor scratch = words(code_order_size(num_codes, dim));
  const CodeTree tree = view_code_tree(memory.mutable_data_ptr(), num_codes, dim);
  const CodeOrder order =
      begin_code_tree(tree, scratch.mutable_data_ptr(),
                      static_cast<const float*>(codebook.const_data_ptr()), num_codes);
  const auto grow = [&](int width, int levels) {
    torch::stable::parallel_for(0, width, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        grow_code_tree(tree, order, width, static_cast<int>(k), levels);
    });
  };
  const int num_threads = static_cast<int>(torch::stable::get_num_threads());
  int width = 1;
  for (; width < num_threads && width < tree.num_groups; width *= 2) grow(width, 1);
  grow(width, kAllLevels);
  return memory;
}

// z [batch, dim, positions] has any strides, codebook [codes, dim] float32 contiguous.
Tensor search(const Tensor& z, const Tensor& codebook, std::optional<Tensor> tree) {
  const int64_t batch = z.size(0), positions = z.size(2), num_queries = batch * positions;
  const int64_t num_codes = codebook.size(0), dim = codebook.size(1);
  Tensor ids = empty(z, {batch, positions}, torch::headeronly::ScalarType::Long);
  const Queries queries{dtype_of(z), z.const_data_ptr(), positions,
                        z.stride(0), z.stride(1),        z.stride(2)};
  if (!tree && tree_pays(num_queries, num_codes, dim)) tree = build_tree(codebook);
  if (num_codes < kMinCodesOfTree) tree.reset();
  const float* codes = static_cast<const float*>(codebook.const_data_ptr());
  const void* nodes = tree ? tree->const_data_ptr() : nullptr;
  int64_t* out = static_cast<int64_t*>(ids.mutable_data_ptr());
  const int64_t grain = nodes ? 1024 : 32 + (1 << 20) / num_codes;
  torch::stable::parallel_for(0, num_queries, grain, [&](int64_t begin, int64_t end) {
    find_nearest_codes(queries, codes, num_codes, static_cast<int>(dim), nodes, begin, end, out);
  });
  return ids;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def("nearest_code(Tensor z, Tensor codebook, Tensor? tree) -> Tensor");
  m.def("nearest_code_tree(Tensor codebook) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&search));
  m.impl("nearest_code_tree", TORCH_BOX(&build_tree));
}

}  // namespace emu3
