// Rows of floats to integers in ranges found from their own values, as monailabel_dfqsam/ops/integer.py defines
// them: every rounding step is written out, so that the integers are the same bit for bit.
#pragma once

#include <algorithm>
#include <cmath>

#include "vector.h"

inline constexpr float kSmallestScale = 0x1p-100f;  // of a row of zeros
inline constexpr int64_t kGroup = 32;
inline constexpr float kLargestMultiplier = 8.0f;
inline constexpr float kCentre = 128.0f;

// The least and the largest of some values and 0.
struct Span {
  float low = 0.0f, high = 0.0f;

  Span(const float* x, int64_t count) {
    float least = 0.0f, most = 0.0f;
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < count; ++i) {
      least = x[i] < least ? x[i] : least;
      most = x[i] > most ? x[i] : most;
    }
    low = least;
    high = most;
  }
  float step(float highest) const { return (high - low) / highest; }
};

// Where a row's integers go, and its scale and zero-point.
struct RowRange {
  uint8_t* q;
  float* scale;
  int32_t* zero_point;  // null: 4 bit in groups
};

inline void quantize_8bit(const float* x, int64_t count, const RowRange& to) {
  const Span span(x, count);
  const float scale = std::max(span.step(255.0f), kSmallestScale), inverse = 1.0f / scale;
  const Levels levels{inverse, __builtin_rintf(-span.low * inverse), 255.0f};
  for (int64_t i = 0; i < count; ++i) to.q[i] = levels.of(x[i]);
  *to.scale = scale;
  *to.zero_point = static_cast<int32_t>(levels.zero_point);
}

inline void quantize_group(const float* x, int64_t count, const Span& span, float unit, uint8_t* q) {
  const float ratio = std::ceil(span.step(15.0f) / unit);
  const float multiplier = std::min(std::max(ratio, 1.0f), kLargestMultiplier);
  const float inverse = 1.0f / (multiplier * unit);
  const float zero_point = __builtin_rintf(-span.low * inverse);
  for (int64_t i = 0; i < count; ++i) {
    float level = __builtin_rintf(x[i] * inverse) + zero_point;
    level = level < 0.0f ? 0.0f : level;
    level = level > 15.0f ? 15.0f : level;
    q[i] = static_cast<uint8_t>(static_cast<int32_t>(multiplier * (level - zero_point) + kCentre));
  }
}

inline void quantize_4bit(const float* x, int64_t count, const RowRange& to) {
  float largest = 0.0f;
  for (int64_t first = 0; first < count; first += kGroup)
    largest = std::max(largest, Span(x + first, std::min(kGroup, count - first)).step(15.0f));
  const float unit = std::max(largest / kLargestMultiplier, kSmallestScale);
  for (int64_t first = 0; first < count; first += kGroup) {
    const int64_t size = std::min(kGroup, count - first);
    // A whole group has a length that the compiler knows.
    if (size == kGroup)
      quantize_group(x + first, kGroup, Span(x + first, kGroup), unit, to.q + first);
    else
      quantize_group(x + first, size, Span(x + first, size), unit, to.q + first);
  }
  *to.scale = unit;
}

inline void quantize_row(const float* x, int64_t count, const RowRange& to) {
  if (to.zero_point == nullptr)
    quantize_4bit(x, count, to);
  else
    quantize_8bit(x, count, to);
}
