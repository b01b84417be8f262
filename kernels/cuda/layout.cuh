// Packed 4-bit rows, and the quantizer that fills them; shared by every kernel of this library.
//
// A row of K values, K padded to a multiple of 32 so that a row is a whole number of 16-byte vectors:
//
//   value    v0   v1   v2   v3   v4   v5   v6   v7  ...
//   byte     v1|v0     v3|v2     v5|v4     v7|v6    ...     high nibble | low nibble
//   word     v7 v6 v5 v4 v3 v2 v1 v0                        little endian, v0 in bits 0-3
//
// Activations are unsigned, 0 ... 15, weights two's complement, -8 ... 7. The tensor cores read rows of both
// along the input dimension. In 8-bit containers the same values take a byte each.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dfqsam {

constexpr int kRowMultiple = 32;  // of values, in K

inline __device__ uint32_t pack8_u4(const int (&v)[8]) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(v[i]) << (4 * i);
  return word;
}

inline __device__ uint2 pack8_u8(const int (&v)[8]) {
  uint2 words{0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words.x |= static_cast<uint32_t>(v[i]) << (8 * i);
    words.y |= static_cast<uint32_t>(v[i + 4]) << (8 * i);
  }
  return words;
}

// Eight neighbouring values of a quantized matrix; `index` counts groups of eight from its beginning.
template <bool kPacked>
inline __device__ void store8(void* out, int64_t index, const int (&v)[8]) {
  if constexpr (kPacked) {
    static_cast<uint32_t*>(out)[index] = pack8_u4(v);
  } else {
    static_cast<uint2*>(out)[index] = pack8_u8(v);
  }
}

// q = clip(round(x / scale) + zero_point, 0, top), ties to even.
struct Quantizer {
  float inverse;     // 1 / scale
  float zero_point;  // an integer
  float top;         // 2^bits - 1

  inline __device__ int operator()(float x) const {
    return static_cast<int>(fminf(fmaxf(rintf(x * inverse) + zero_point, 0.f), top));
  }
};

inline __device__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(__half x) { return __half2float(x); }

// Eight halves or floats from a 16-byte aligned address.
inline __device__ void load8(const __half* p, float (&v)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  const __half2* pairs = reinterpret_cast<const __half2*>(&raw);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

inline __device__ void load8(const float* p, float (&v)[8]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0];
  const float4 b = reinterpret_cast<const float4*>(p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

}  // namespace dfqsam
