// LayerNorm and rounding to integers, each written so that every rounding step is defined: results equal
// the plain torch forms in monailabel_dfqsam/ops bit for bit. Compiled without contraction to fused multiply-adds.

#include <cmath>
#include <cstdint>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "vector.h"

namespace {

constexpr int64_t kChunk = 4096;

}  // namespace

// q[i] = clip(round(x[i]·inverse_scale) + zero_point, 0, highest), ties to even.
DFQSAM_API int dfqsam_quantize(const float* x, uint8_t* q, int64_t count, float inverse_scale, float zero_point,
                                float highest) {
  const Levels to{inverse_scale, zero_point, highest};
#pragma omp parallel for schedule(static) if (count > 4 * kChunk)
  for (int64_t start = 0; start < count; start += kChunk) {
    const int64_t stop = start + kChunk < count ? start + kChunk : count;
    for (int64_t i = start; i < stop; ++i) q[i] = to.of(x[i]);
  }
  return 0;
}

// LayerNorm over rows [rows, channels], then the quantizer above. Mean and variance are summed in double, so
// that their float values do not depend on the order of summation. y, the normalised floats, may be null.
DFQSAM_API int dfqsam_layer_norm_quantize(const float* x, const float* weight, const float* bias, float* y,
                                           uint8_t* q, int64_t rows, int64_t channels, double epsilon,
                                           float inverse_scale, float zero_point, float highest) {
  const Levels to{inverse_scale, zero_point, highest};
#pragma omp parallel for schedule(static) if (rows * channels > 4 * kChunk)
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * channels;
    double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < channels; ++c) sum += row[c];
    const double mean = sum / channels;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < channels; ++c) {
      const double d = row[c] - mean;
      squares += d * d;
    }
    const float center = static_cast<float>(mean);
    const float factor = static_cast<float>(1.0 / std::sqrt(squares / channels + epsilon));
    uint8_t* levels = q + r * channels;
    if (y == nullptr) {
      for (int64_t c = 0; c < channels; ++c)
        levels[c] = to.of((row[c] - center) * factor * weight[c] + bias[c]);
    } else {
      float* out = y + r * channels;
      for (int64_t c = 0; c < channels; ++c) {
        out[c] = (row[c] - center) * factor * weight[c] + bias[c];
        levels[c] = to.of(out[c]);
      }
    }
  }
  return 0;
}

// Has freed memory kept for the next call instead of being handed back, cleared and faulted in anew each time.
// Returns 0, or 1 where the C library offers no such choice.
DFQSAM_API int dfqsam_keep_memory() {
#if defined(__GLIBC__)
  constexpr int kLargestKept = 32 << 20, kFreeAtMost = 256 << 20;
  return mallopt(M_MMAP_THRESHOLD, kLargestKept) && mallopt(M_TRIM_THRESHOLD, kFreeAtMost) ? 0 : 1;
#else
  return 1;
#endif
}
