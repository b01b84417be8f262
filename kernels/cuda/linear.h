// One quantized matrix product, and the functions that run it, one a family of GPUs.
//
// 4-bit arithmetic exists where a family has `linear_u4s4_native`; elsewhere 4-bit values are multiplied by
// `linear_u8s8`, in 8-bit containers, on int8 tensor cores.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "layout.cuh"

namespace dfqsam {

// y[m, n] = (sum_k x[m, k] * weight[n, k]) * scale[n] + bias[n], then one of two endings.
struct Linear {
  const void* x;         // [M, K] unsigned, packed or a byte each, 16-byte aligned
  const void* weight;    // [N, K] signed, likewise
  const float* scale;    // [N], input scale times weight scale
  const float* bias;     // [N], with the input's zero-point folded in
  const __half* residual;  // [M, N] added to y, or null
  __half* out;             // [M, N] y, or null
  void* quantized;         // [M, N] quantize(gelu(y)), in the containers of x, or null
  Quantizer quantizer;     // for `quantized`
  int m, n, k;             // n % 8 == 0; k % 32 == 0; for `quantized` n % 32 == 0
  int multiprocessors;     // of the device
  cudaStream_t stream;
};

namespace sm75 {
cudaError_t linear_u4s4_native(const Linear&);
cudaError_t linear_u8s8(const Linear&);
}  // namespace sm75

namespace sm80 {  // and sm_86, sm_89
cudaError_t linear_u4s4_native(const Linear&);
cudaError_t linear_u8s8(const Linear&);
}  // namespace sm80

namespace sm90 {
cudaError_t linear_u8s8(const Linear&);
}  // namespace sm90

namespace sm100 {  // and sm_120
cudaError_t linear_u8s8(const Linear&);
}  // namespace sm100

}  // namespace dfqsam
