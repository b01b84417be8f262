// Rows of floats to integers in ranges found from their own values, as monailabel_dfqsam/ops/integer.py defines
// them: every rounding step is written out, so that the integers are the same bit for bit.
#pragma once

#include <algorithm>
#include <vector>

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

// Of a row's groups: first their least values and steps, then how they become levels.
struct GroupRanges {
  float *low, *step, *multiplier, *inverse;

  explicit GroupRanges(int64_t groups) {
    static thread_local std::vector<float> memory;
    memory.resize(4 * groups);
    low = memory.data();
    step = low + groups;
    multiplier = step + groups;
    inverse = multiplier + groups;
  }
};

inline void quantize_group(const float* x, int64_t count, const GroupRanges& ranges, int64_t group, uint8_t* q) {
  const float multiplier = ranges.multiplier[group], inverse = ranges.inverse[group];
  const float zero_point = __builtin_rintf(-ranges.low[group] * inverse);
  for (int64_t i = 0; i < count; ++i) {
    float level = __builtin_rintf(x[i] * inverse) + zero_point;
    level = level < 0.0f ? 0.0f : level;
    level = level > 15.0f ? 15.0f : level;
    q[i] = static_cast<uint8_t>(static_cast<int32_t>(multiplier * (level - zero_point) + kCentre));
  }
}

inline void quantize_4bit(const float* x, int64_t count, const RowRange& to) {
  const int64_t whole = count / kGroup, groups = (count + kGroup - 1) / kGroup, rest = count - whole * kGroup;
  const GroupRanges ranges(groups);
  for (int64_t g = 0; g < groups; ++g) {
    // A whole group has a length that the compiler knows.
    const Span span = g < whole ? Span(x + g * kGroup, kGroup) : Span(x + g * kGroup, rest);
    ranges.low[g] = span.low;
    ranges.step[g] = span.high - span.low;
  }
  float largest = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int64_t g = 0; g < groups; ++g) {
    ranges.step[g] /= 15.0f;
    largest = ranges.step[g] > largest ? ranges.step[g] : largest;
  }
  const float unit = std::max(largest / kLargestMultiplier, kSmallestScale);
#pragma omp simd
  for (int64_t g = 0; g < groups; ++g) {
    const float ratio = __builtin_ceilf(ranges.step[g] / unit);
    const float bounded = ratio < 1.0f ? 1.0f : ratio;
    ranges.multiplier[g] = bounded > kLargestMultiplier ? kLargestMultiplier : bounded;
    ranges.inverse[g] = 1.0f / (ranges.multiplier[g] * unit);
  }
  for (int64_t g = 0; g < whole; ++g) quantize_group(x + g * kGroup, kGroup, ranges, g, to.q + g * kGroup);
  if (rest != 0) quantize_group(x + whole * kGroup, rest, ranges, whole, to.q + whole * kGroup);
  *to.scale = unit;
}

inline void quantize_row(const float* x, int64_t count, const RowRange& to) {
  if (to.zero_point == nullptr)
    quantize_4bit(x, count, to);
  else
    quantize_8bit(x, count, to);
}
