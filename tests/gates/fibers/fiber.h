// Runs CUDA C++ on a CPU, for tests: compile a .cuh with g++ and this header first, then call
// fiber::launch. A block has one fiber per thread. A thread runs until it waits at a barrier or a
// shuffle; a seed shuffles the order of threads anew after each barrier, and shared memory is
// filled with NaN before each block. A missing __syncthreads() therefore reads NaN or values that
// depend on the seed. A barrier that not every thread of the block reaches, or that threads reach
// at different lines, is an error. Blocks run one after the other.
#pragma once

#include <link.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Shared memory is the thread-local storage of the program, one range that can be filled with NaN.
// All blocks run on one thread of the system, one after the other, so one copy is enough.
#define __shared__ static thread_local
#define __syncthreads() fiber::wait({__LINE__, 0xffffffff, true})
#define __syncwarp() fiber::wait({__LINE__, 0xffffffff, false})
#define __shfl_sync(mask, value, lane) fiber::shuffle(__LINE__, mask, value, lane)
#define __shfl_xor_sync(mask, value, bits) \
  fiber::shuffle(__LINE__, mask, value, (fiber::current_lane() ^ (bits)))
#define __shfl_down_sync(mask, value, by) \
  fiber::shuffle(__LINE__, mask, value, fiber::clamp_lane(fiber::current_lane() + (by)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// A fiber yields only where it waits, so plain code is atomic.
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}

template <typename T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}

inline dim3 gridDim, blockDim, blockIdx;

namespace fiber {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

// Where a thread waits, for the whole block or for the lanes of its warp in `mask`.
struct Place {
  int line;
  uint32_t mask;
  bool block;
  bool operator==(const Place& other) const {
    return line == other.line && mask == other.mask && block == other.block;
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  bool waits = false, done = false;
  Place place{};
  uint64_t sent = 0;  // its value in a shuffle
};

struct Block {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  Thread* running = nullptr;
  void (*body)(void*) = nullptr;
  void* kernel = nullptr;
};

inline Block block;

// `threadIdx` is the running thread's; a kernel reads it like the built-in.
struct ThreadIndex {
  struct Axis {
    unsigned dim3::* axis;
    operator unsigned() const { return block.running->index.*axis; }
  };
  Axis x{&dim3::x}, y{&dim3::y}, z{&dim3::z};
};

inline int current() { return static_cast<int>(block.running - block.threads.data()); }
inline int current_lane() { return current() % kWarp; }
inline int clamp_lane(int lane) { return lane < kWarp ? lane : current_lane(); }

inline void wait(Place place) {
  Thread& self = *block.running;
  self.waits = true;
  self.place = place;
  swapcontext(&self.context, &block.scheduler);
}

template <typename T>
T shuffle(int line, uint32_t mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  memcpy(&block.running->sent, &value, sizeof value);
  wait({line, mask, false});
  memcpy(&value, &block.threads[current() / kWarp * kWarp + lane].sent, sizeof value);
  wait({line, mask, false});  // no lane sends again before all have read
  return value;
}

inline void enter() {
  block.body(block.kernel);
  block.running->done = true;
  swapcontext(&block.running->context, &block.scheduler);
}

inline void start(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStack;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
}

[[noreturn]] inline void fail(const std::string& what, int thread) {
  throw std::runtime_error("fiber: thread " + std::to_string(thread) + " of block " +
                           std::to_string(blockIdx.x) + " " + what);
}

// Resumes the threads of [begin, end) in `mask` if all of them wait at the same place.
inline bool release(int begin, int end, uint32_t mask) {
  std::vector<Thread*> group;
  for (int i = begin; i < end; ++i)
    if (mask >> (i - begin) % kWarp & 1) group.push_back(&block.threads[i]);
  for (Thread* thread : group)
    if (!thread->waits || !(thread->place == group[0]->place)) return false;
  for (Thread* thread : group) thread->waits = false;
  return true;
}

// Opens at least one barrier when every thread waits or is done, or fails with one that never
// opens.
inline void open_barriers() {
  const int count = static_cast<int>(block.threads.size());
  bool opened = false;
  for (int i = 0; i < count; ++i) {
    const Thread& thread = block.threads[i];
    if (!thread.waits) continue;
    const int warp = i / kWarp * kWarp;
    opened |= thread.place.block ? release(0, count, 0xffffffff)
                                 : release(warp, std::min(warp + kWarp, count), thread.place.mask);
  }
  if (opened) return;
  for (int i = 0; i < count; ++i)
    if (block.threads[i].waits)
      fail("waits for ever at line " + std::to_string(block.threads[i].place.line) +
               ": a barrier that other threads do not reach",
           i);
}

// NaN as float, -1 as integer, in all __shared__ variables of the program.
inline void poison_shared_memory() {
  const auto poison = [](dl_phdr_info* object, size_t, void*) {
    for (int i = 0; i < object->dlpi_phnum; ++i)
      if (object->dlpi_phdr[i].p_type == PT_TLS)
        memset(object->dlpi_tls_data, 0xff, object->dlpi_phdr[i].p_memsz);
    return 1;  // the program comes first; libraries have thread-local storage of their own
  };
  dl_iterate_phdr(poison, nullptr);
}

inline void run_block(std::mt19937& random) {
  poison_shared_memory();
  std::vector<int> order(block.threads.size());
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 0; i < order.size(); ++i) {
    Thread& thread = block.threads[i];
    const unsigned x = static_cast<unsigned>(i);
    thread.index = {x % blockDim.x, x / blockDim.x % blockDim.y, x / (blockDim.x * blockDim.y)};
    thread.waits = thread.done = false;
    start(thread);
  }
  const auto done = [](const Thread& thread) { return thread.done; };
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      Thread& thread = block.threads[i];
      if (thread.done || thread.waits) continue;
      block.running = &thread;
      swapcontext(&block.scheduler, &thread.context);
    }
    if (std::all_of(block.threads.begin(), block.threads.end(), done)) return;
    open_barriers();
  }
}

// kernel<<<grid, threads>>>(): `kernel` is a callable without arguments, run once for each thread.
template <typename Kernel>
void launch(dim3 grid, dim3 threads, unsigned seed, Kernel kernel) {
  std::mt19937 random(seed);
  gridDim = grid, blockDim = threads;
  block.threads = std::vector<Thread>(threads.x * threads.y * threads.z);
  block.body = [](void* body) { (*static_cast<Kernel*>(body))(); };
  block.kernel = &kernel;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(random);
      }
}

}  // namespace fiber

inline const fiber::ThreadIndex threadIdx;
