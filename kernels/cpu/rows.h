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

// Where a row's integers go, and its range.
struct RowRange {
  uint8_t* q;
  float* scale;
  int32_t* zero_point;  // null: 4 bit in groups
  int32_t* multiplier;  // of groups, each as two equal halves: q is then a level less its zero-point. Null: q is whole
  int32_t* term;        // with multipliers: −128·Σ multiplier·q, for a product by weights that are 128 too large

  // That of the r-th row behind.
  RowRange row(int64_t r, int64_t columns) const {
    return {q + r * columns, scale + r, zero_point == nullptr ? nullptr : zero_point + r,
            multiplier == nullptr ? nullptr : multiplier + r * ((columns + kGroup - 1) / kGroup),
            term == nullptr ? nullptr : term + r};
  }
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

// q = multiplier·(level − zero_point) + centre.
inline void quantize_group(const float* x, int64_t count, const GroupRanges& ranges, int64_t group, float multiplier,
                           float centre, uint8_t* q) {
  const float inverse = ranges.inverse[group], zero_point = __builtin_rintf(-ranges.low[group] * inverse);
  for (int64_t i = 0; i < count; ++i) {
    float level = __builtin_rintf(x[i] * inverse) + zero_point;
    level = level < 0.0f ? 0.0f : level;
    level = level > 15.0f ? 15.0f : level;
    q[i] = static_cast<uint8_t>(static_cast<int32_t>(multiplier * (level - zero_point) + centre));
  }
}

// The same, of a group by itself; returns Σ q.
inline int32_t quantize_levels(const float* x, int64_t count, const GroupRanges& ranges, int64_t group, uint8_t* q) {
  quantize_group(x, count, ranges, group, 1.0f, 0.0f, q);
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<int8_t>(q[i]);
  return sum;
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
  *to.scale = unit;
  if (to.multiplier == nullptr) {
    for (int64_t g = 0; g < whole; ++g)
      quantize_group(x + g * kGroup, kGroup, ranges, g, ranges.multiplier[g], kCentre, to.q + g * kGroup);
    if (rest != 0)
      quantize_group(x + whole * kGroup, rest, ranges, whole, ranges.multiplier[whole], kCentre, to.q + whole * kGroup);
    return;
  }
  int32_t sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const auto multiplier = static_cast<int32_t>(ranges.multiplier[g]);
    const float* from = x + g * kGroup;
    uint8_t* q = to.q + g * kGroup;
    sum += multiplier * (g < whole ? quantize_levels(from, kGroup, ranges, g, q) : quantize_levels(from, rest, ranges, g, q));
    to.multiplier[g] = multiplier * 0x10001;
  }
  *to.term = -static_cast<int32_t>(kCentre) * sum;
}

inline void quantize_row(const float* x, int64_t count, const RowRange& to) {
  if (to.zero_point == nullptr)
    quantize_4bit(x, count, to);
  else
    quantize_8bit(x, count, to);
}
