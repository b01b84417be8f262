// LayerNorm and quantize in one pass over memory: a warp a row, the row held in registers, statistics in fp32.
#include "rows.h"

namespace dfqsam {
namespace {

constexpr int kWarps = 4;
constexpr int kVectors = 8;  // of eight values a lane: up to 2048 channels

__device__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <class T, bool kPacked>
__global__ void layer_norm_quantize_kernel(
    const T* x, const float* weight, const float* bias, float epsilon, int64_t rows, int channels, void* out,
    int padded, Quantizer quantizer) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;  // the same for a whole warp
  const int lane = threadIdx.x % 32;
  float v[kVectors][8];
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int first = (j * 32 + lane) * 8;
    if (first < channels) {
      load8(x + row * channels + first, v[j]);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += v[j][i];
    }
  }
  const float mean = warp_sum(sum) / channels;
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if ((j * 32 + lane) * 8 < channels) {
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += (v[j][i] - mean) * (v[j][i] - mean);
    }
  }
  const float deviation = rsqrtf(warp_sum(squares) / channels + epsilon);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int first = (j * 32 + lane) * 8;
    if (first >= padded) break;
    int q[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (first < channels) {
      float gamma[8], beta[8];
      load8(weight + first, gamma);
      load8(bias + first, beta);
#pragma unroll
      for (int i = 0; i < 8; ++i) q[i] = quantizer((v[j][i] - mean) * deviation * gamma[i] + beta[i]);
    }
    store8<kPacked>(out, (row * padded + first) / 8, q);
  }
}

template <class T>
cudaError_t launch(
    const T* x, const float* weight, const float* bias, float epsilon, int64_t rows, int channels,
    const QuantizedRows& to, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const auto kernel =
      to.packed ? layer_norm_quantize_kernel<T, true> : layer_norm_quantize_kernel<T, false>;
  kernel<<<blocks, kWarps * 32, 0, stream>>>(
      x, weight, bias, epsilon, rows, channels, to.out, to.padded, to.quantizer);
  return cudaGetLastError();
}

}  // namespace

cudaError_t layer_norm_quantize(
    const void* x, bool half, const float* weight, const float* bias, float epsilon, int64_t rows,
    int channels, const QuantizedRows& to, cudaStream_t stream) {
  if (channels % 8 != 0 || to.padded > kVectors * 256) return cudaErrorInvalidValue;
  return half ? launch(static_cast<const __half*>(x), weight, bias, epsilon, rows, channels, to, stream)
              : launch(static_cast<const float*>(x), weight, bias, epsilon, rows, channels, to, stream);
}

}  // namespace dfqsam
