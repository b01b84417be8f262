// LayerNorm and rounding to integers, each written so that every rounding step is defined: results equal
// the plain torch forms in monailabel_dfqsam/ops bit for bit. Compiled without contraction to fused multiply-adds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "rows.h"

namespace {

constexpr int64_t kChunk = 4096;

// As monailabel_dfqsam/ops/plain.py has it, step by step.
inline void gelu(float* x, int64_t count) {
  constexpr float kAbove[] = {1.92139851e-08f, -1.98997373e-06f, 0.000155503905f, 0.00429217424f, 0.0524312332f,
                              0.213927448f, 1.12837863f};
  constexpr float kBelow[] = {0.00109778228f, 0.0155495424f, 0.120792486f, 0.522915959f, 1.0f};
  for (int64_t i = 0; i < count; ++i) {
    float t = x[i] * 0.70710678f;
    t = t < -4.0f ? -4.0f : t;
    t = t > 4.0f ? 4.0f : t;
    const float z = t * t;
    float above = kAbove[0], below = kBelow[0];
    for (int k = 1; k < 7; ++k) above = above * z + kAbove[k];
    for (int k = 1; k < 5; ++k) below = below * z + kBelow[k];
    x[i] = (x[i] * 0.5f) * (above * t / below + 1.0f);
  }
}

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

// x [count] to its GELU.
DFQSAM_API int dfqsam_gelu(float* x, int64_t count) {
#pragma omp parallel for schedule(static) if (count > 4 * kChunk)
  for (int64_t start = 0; start < count; start += kChunk) gelu(x + start, std::min(kChunk, count - start));
  return 0;
}

// Each row of x [rows, columns] in a range of its own: scale [rows], and zero_point [rows], or null for 4 bit in
// groups; for these multiplier [rows, groups] and term [rows], or null, as in `RowRange`. With `by_gelu` x becomes its
// GELU first.
DFQSAM_API int dfqsam_quantize_rows(float* x, uint8_t* q, float* scale, int32_t* zero_point, int32_t* multiplier,
                                     int32_t* term, int64_t rows, int64_t columns, int by_gelu) {
  const RowRange first{q, scale, zero_point, multiplier, term};
#pragma omp parallel for schedule(static) if (rows * columns > 4 * kChunk)
  for (int64_t r = 0; r < rows; ++r) {
    if (by_gelu) gelu(x + r * columns, columns);
    quantize_row(x + r * columns, columns, first.row(r, columns));
  }
  return 0;
}

// LayerNorm over rows [rows, channels], then one of the quantizers above: that of rows where scale is not null.
// Mean and variance are summed in double, so that their float values do not depend on the order of summation.
// y, the normalised floats, may be null.
DFQSAM_API int dfqsam_layer_norm_quantize(const float* x, const float* weight, const float* bias, float* y,
                                           uint8_t* q, float* scale, int32_t* zero_point,
                                           int32_t* multiplier, int32_t* term, int64_t rows, int64_t channels,
                                           double epsilon, float inverse_scale,
                                           float static_zero_point, float highest) {
  const Levels to{inverse_scale, static_zero_point, highest};
  const RowRange first{q, scale, zero_point, multiplier, term};
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
      quantize_row(out, channels, first.row(r, channels));
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
