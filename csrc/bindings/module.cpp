// The Python module: importing it loads the library, which registers torch.ops.emu3_kernels.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

int64_t level() { return cpu_level(); }
int64_t highest_level() { return highest_cpu_level(); }
void set_level(int64_t level) { set_cpu_level(static_cast<int>(level)); }
void huge_pages(const Tensor& memory) { advise_huge_pages(memory); }

}  // namespace

STABLE_TORCH_LIBRARY(emu3_kernels, m) {
  m.def("cpu_level() -> int");
  m.def("highest_cpu_level() -> int");
  m.def("set_cpu_level(int level) -> ()");
  m.def("use_large_pages(Tensor memory) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&level));
  m.impl("highest_cpu_level", TORCH_BOX(&highest_level));
  m.impl("set_cpu_level", TORCH_BOX(&set_level));
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("use_large_pages", TORCH_BOX(&huge_pages));
}

}  // namespace emu3

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
