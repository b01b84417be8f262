// What attentions are made of: float32 products in cache, exponentials, and memory that is kept.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "vector.h"

namespace {

constexpr int64_t kPanel = kTileVectors * kLanes;

// C [MR, NV vectors] = (accumulate ? C : 0) + A [MR, depth] · B [depth, NV vectors].
template <int MR, int NV>
void tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
          bool accumulate) {
  Vec acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = accumulate ? load(c + i * ldc + j * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[NV];
    for (int j = 0; j < NV; ++j) row[j] = load(b + k * ldb + j * kLanes);
    for (int i = 0; i < MR; ++i) {
      const Vec x = broadcast(a[i * lda + k]);
      for (int j = 0; j < NV; ++j) acc[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
}

template <int NV>
void tile_of(int rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool accumulate) {
  switch (rows) {
#define CASE(n) \
  case n:       \
    return tile<n, NV>(depth, a, lda, b, ldb, c, ldc, accumulate)
    CASE(1);
    CASE(2);
    CASE(3);
    CASE(4);
    CASE(5);
    CASE(6);
#undef CASE
  }
}

// C [rows, columns] = (accumulate ? C : 0) + A [rows, depth] · B [depth, columns]; columns in whole vectors.
// B's columns come in panels of kPanel, each `panel` floats after the one before.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
              int64_t ldb, int64_t panel, float* c, int64_t ldc, bool accumulate) {
  const int64_t parts = (rows + kTileRows - 1) / kTileRows;
  for (int64_t n = 0; n < columns; n += kPanel, b += panel) {
    const int64_t vectors = std::min<int64_t>(kTileVectors, (columns - n) / kLanes);
    for (int64_t p = 0, m = 0; p < parts; ++p) {
      const int count = static_cast<int>(rows * (p + 1) / parts - m);  // even parts: no thin last one
      const float* a0 = a + m * lda;
      float* c0 = c + m * ldc + n;
      switch (vectors) {
        case 1:
          tile_of<1>(count, depth, a0, lda, b, ldb, c0, ldc, accumulate);
          break;
        case 2:
          tile_of<2>(count, depth, a0, lda, b, ldb, c0, ldc, accumulate);
          break;
#if !defined(__AVX2__) || defined(__AVX512F__)
        case 3:
          tile_of<3>(count, depth, a0, lda, b, ldb, c0, ldc, accumulate);
          break;
        case 4:
          tile_of<4>(count, depth, a0, lda, b, ldb, c0, ldc, accumulate);
          break;
#endif
      }
      m += count;
    }
  }
}

// e^x for x <= 0, relative error below 1e-7; below the least normal number, about 1e-38.
inline Vec exponential(Vec x) {
  constexpr float kShifter = 12582912.0f;  // 1.5·2^23: adding it leaves the rounded integer in the low bits
  x = larger(x, broadcast(-87.0f));
  const Vec shifted = x * 1.44269504f + kShifter;
  const Vec n = shifted - kShifter;
  Vec r = x - n * 0.693359375f;  // ln 2 in two parts, the first of few bits
  r = r + n * 2.12194440e-4f;
  Vec p = broadcast(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}

// logits to e^(logits − peak); returns their sum.
inline float exponentials(float* logits, int64_t count, float peak) {
  Vec total{};
  for (int64_t t = 0; t < count; t += kLanes) {
    const Vec e = exponential(load(logits + t) - peak);
    total += e;
    store(logits + t, e);
  }
  return sum_of(total);
}

// Swaps rows and columns of a square of kLanes × kLanes.
inline void transpose(Vec (&rows)[kLanes]) {
  for (int width = 1; width < kLanes; width *= 2) {
    IntVec low, high;
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane & width ? kLanes + lane - width : lane;
      high[lane] = lane & width ? kLanes + lane : lane + width;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (i & width) continue;
      const Vec a = rows[i], b = rows[i + width];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + width] = __builtin_shuffle(a, b, high);
    }
  }
}

// A thread's own memory, kept between calls: a server runs the same shapes again and again.
class Scratch {
 public:
  float* take(int64_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{64})));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// Divides memory into parts that begin on whole vectors, or, without any, only counts the floats they take.
struct Division {
  float* memory;
  int64_t used = 0;
  float* operator()(int64_t floats) {
    float* start = memory == nullptr ? nullptr : memory + used;
    used += round_up(floats, kLanes);
    return start;
  }
};

}  // namespace
