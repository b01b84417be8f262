// Enough of CUDA to run kernels without a GPU: blocks one after the other, threads likewise, but for the threads
// of a warp that talk to each other, which become threads of the CPU. Atomics, shared memory and barriers are not
// here, because the kernels between matrix products use none.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <thread>
#include <vector>

#undef __global__
#define __global__
#undef __device__
#define __device__

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index threadIdx, blockIdx;
inline thread_local std::barrier<>* warp_barrier = nullptr;
inline thread_local float* warp_values = nullptr;

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  const unsigned lane = threadIdx.x % 32;
  warp_values[lane] = value;
  warp_barrier->arrive_and_wait();
  const float other = warp_values[lane ^ static_cast<unsigned>(offset)];
  warp_barrier->arrive_and_wait();
  return other;
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

template <class Body>
void run_block(unsigned threads, const Index& block, bool warps_talk, Body body) {
  if (!warps_talk) {
    for (unsigned thread = 0; thread < threads; ++thread) {
      blockIdx = block;
      threadIdx = {thread, 0, 0};
      body();
    }
    return;
  }
  for (unsigned first = 0; first < threads; first += 32) {
    std::barrier<> barrier(32);
    float values[32];
    std::vector<std::thread> lanes;
    for (unsigned lane = 0; lane < 32; ++lane)
      lanes.emplace_back([&, lane] {
        blockIdx = block;
        threadIdx = {first + lane, 0, 0};
        warp_barrier = &barrier;
        warp_values = values;
        body();
        barrier.arrive_and_drop();
      });
    for (std::thread& lane : lanes) lane.join();
  }
}

template <class Body>
void run_grid(dim3 grid, unsigned threads, bool warps_talk, Body body) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_block(threads, {x, y, z}, warps_talk, body);
}

// What the C interface asks of CUDA's runtime, and no matrix products, which need a GPU.
extern "C" {
inline cudaError_t cuda_ok() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cuda_ok(); }
cudaError_t cudaSetDevice(int) { return cuda_ok(); }
cudaError_t cudaGetDevice(int*) { return cudaErrorNoDevice; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNoDevice; }
const char* cudaGetErrorString(cudaError_t) { return "no GPU"; }
}
