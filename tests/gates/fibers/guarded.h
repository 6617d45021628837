// Memory that ends at an unmapped page: an access past its end is a segmentation fault.
#pragma once

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

inline void* guarded(size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
  char* memory = static_cast<char*>(
      mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(memory + size, page, PROT_NONE);
  return memory + size - bytes;
}

inline void* read_guarded(size_t bytes) {
  void* data = guarded(bytes);
  if (fread(data, 1, bytes, stdin) != bytes) throw std::runtime_error("short input");
  return data;
}
