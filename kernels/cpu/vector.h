// Vectors of floats as wide as the target's registers, and the register tile that fits it.
#pragma once

#include <cstdint>
#include <cstring>

// What Python calls; everything else stays inside the library.
#define DFQSAM_API extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr int kTileRows = 6;  // 6·4 accumulators, 4 vectors of one operand and one of the other, of 32 registers
inline constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = 2;
#else
inline constexpr int kLanes = 4;
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec broadcast(float x) { return Vec{} + x; }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// The lanes whose index differs in one bit, changed over.
inline Vec swapped(Vec v, int bit) {
  IntVec order;
  for (int lane = 0; lane < kLanes; ++lane) order[lane] = lane ^ bit;
  return __builtin_shuffle(v, order);
}

inline float sum_of(Vec v) {
  for (int bit = 1; bit < kLanes; bit *= 2) v += swapped(v, bit);
  return v[0];
}

inline float largest_of(Vec v) {
  for (int bit = 1; bit < kLanes; bit *= 2) v = larger(v, swapped(v, bit));
  return v[0];
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What multiplies its input by a reciprocal scale and rounds it to levels 0 … highest, ties to even.
struct Levels {
  float inverse_scale, zero_point, highest;

  uint8_t of(float x) const {
    float q = __builtin_rintf(x * inverse_scale) + zero_point;
    q = q < 0.0f ? 0.0f : q;
    q = q > highest ? highest : q;
    return static_cast<uint8_t>(static_cast<int32_t>(q));
  }
};
