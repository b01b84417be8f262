// LayerNorm and rounding to integers, each written so that every rounding step is defined: results equal
// the plain torch forms in monailabel_dfqsam/ops bit for bit. Compiled without contraction to fused multiply-adds.

#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "rows.h"

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

// Each row of x [rows, columns] in a range of its own: scale [rows], and zero_point [rows], or null for 4 bit in
// groups.
DFQSAM_API int dfqsam_quantize_rows(const float* x, uint8_t* q, float* scale, int32_t* zero_point, int64_t rows,
                                     int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > 4 * kChunk)
  for (int64_t r = 0; r < rows; ++r) {
    const RowRange to{q + r * columns, scale + r, zero_point == nullptr ? nullptr : zero_point + r};
    quantize_row(x + r * columns, columns, to);
  }
  return 0;
}

// LayerNorm over rows [rows, channels], then one of the quantizers above: that of rows where scale is not null.
// Mean and variance are summed in double, so that their float values do not depend on the order of summation.
// y, the normalised floats, may be null.
DFQSAM_API int dfqsam_layer_norm_quantize(const float* x, const float* weight, const float* bias, float* y,
                                           uint8_t* q, float* scale, int32_t* zero_point, int64_t rows,
                                           int64_t channels, double epsilon, float inverse_scale,
                                           float static_zero_point, float highest) {
  const Levels to{inverse_scale, static_zero_point, highest};
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
    static thread_local std::vector<float> memory;
    if (y == nullptr) memory.resize(channels);
    float* out = y == nullptr ? memory.data() : y + r * channels;
    for (int64_t c = 0; c < channels; ++c) out[c] = (row[c] - center) * factor * weight[c] + bias[c];
    uint8_t* levels = q + r * channels;
    if (scale != nullptr)
      quantize_row(out, channels, {levels, scale + r, zero_point == nullptr ? nullptr : zero_point + r});
    else
      for (int64_t c = 0; c < channels; ++c) levels[c] = to.of(out[c]);
  }
  return 0;
}

// What follows a product of such rows. sums [rows, columns] are whole, Σ (q − 128)·weight; weights [columns] are
// Σ weight. Gives (sums + (128 − zero_point)·weights)·(scale·weight_scale) + bias: in place, or added to residual
// where that is not null.
DFQSAM_API int dfqsam_rescale(float* sums, const float* scale, const int32_t* zero_point, const int32_t* weights,
                              const float* weight_scale, const float* bias, float* residual, int64_t rows,
                              int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > 4 * kChunk)
  for (int64_t r = 0; r < rows; ++r) {
    float* row = sums + r * columns;
    const float row_scale = scale[r];
    if (zero_point != nullptr) {
      const int32_t shift = 128 - zero_point[r];
      for (int64_t n = 0; n < columns; ++n)
        row[n] = static_cast<float>(static_cast<int32_t>(row[n]) + shift * weights[n]);
    }
    if (residual == nullptr) {
      for (int64_t n = 0; n < columns; ++n) row[n] = row[n] * (row_scale * weight_scale[n]) + bias[n];
    } else {
      float* out = residual + r * columns;
      for (int64_t n = 0; n < columns; ++n) out[n] += row[n] * (row_scale * weight_scale[n]) + bias[n];
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
