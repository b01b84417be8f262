// Quantize rows, and unpack weights once for GPUs without 4-bit arithmetic.
#include "rows.h"

namespace dfqsam {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t work) { return static_cast<unsigned>((work + kThreads - 1) / kThreads); }

template <class T, bool kPacked>
__global__ void quantize_rows_kernel(
    const T* x, int64_t rows, int columns, int64_t stride, bool aligned, void* out, int padded,
    Quantizer quantizer) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int groups = padded / 8;
  if (index >= rows * groups) return;
  const int64_t row = index / groups;
  const int first = static_cast<int>(index % groups) * 8;
  const T* source = x + row * stride + first;
  int q[8];
  if (aligned && first + 8 <= columns) {
    float v[8];
    load8(source, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = quantizer(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = first + i < columns ? quantizer(to_float(source[i])) : 0;
  }
  store8<kPacked>(out, index, q);
}

template <class T>
cudaError_t launch(
    const T* x, int64_t rows, int columns, int64_t stride, const QuantizedRows& to, cudaStream_t stream) {
  const int64_t work = rows * (to.padded / 8);
  if (work == 0) return cudaSuccess;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride % 8 == 0;
  const auto kernel = to.packed ? quantize_rows_kernel<T, true> : quantize_rows_kernel<T, false>;
  kernel<<<blocks_for(work), kThreads, 0, stream>>>(
      x, rows, columns, stride, aligned, to.out, to.padded, to.quantizer);
  return cudaGetLastError();
}

__global__ void unpack_signed_kernel(const uint8_t* packed, int8_t* out, int64_t bytes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= bytes) return;
  const int8_t pair = static_cast<int8_t>(packed[index]);
  out[2 * index] = static_cast<int8_t>(pair << 4) >> 4;  // shifted up and back, the sign comes along
  out[2 * index + 1] = pair >> 4;
}

}  // namespace

cudaError_t quantize_rows(
    const void* x, bool half, int64_t rows, int columns, int64_t stride, const QuantizedRows& to,
    cudaStream_t stream) {
  return half ? launch(static_cast<const __half*>(x), rows, columns, stride, to, stream)
              : launch(static_cast<const float*>(x), rows, columns, stride, to, stream);
}

cudaError_t unpack_signed(const uint8_t* packed, int8_t* out, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  unpack_signed_kernel<<<blocks_for(bytes), kThreads, 0, stream>>>(packed, out, bytes);
  return cudaGetLastError();
}

}  // namespace dfqsam
