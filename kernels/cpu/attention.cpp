// SAM's multi-head attention in float32, windows and decomposed relative position included.
//
// One task is one head of one window (or of the whole grid). Keys lie in rows of the window, each padded to
// whole vectors, so that the relative position is one number a row plus one vector a row, added while the
// logits are in cache and never stored as a matrix. Padding of windows costs keys, but no queries. Softmax
// runs online over blocks of keys, so that memory does not grow with the square of the tokens.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "vector.h"

namespace {

constexpr int64_t kKeysPerBlock = 512;
constexpr int64_t kQueriesPerBlock = 32;

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
#if defined(__AVX512F__)
    CASE(7);
#endif
#undef CASE
  }
}

// C [rows, columns] = (accumulate ? C : 0) + A [rows, depth] · B [depth, columns]; columns in whole vectors.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
              int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  const int64_t parts = (rows + kTileRows - 1) / kTileRows;
  for (int64_t n = 0; n < columns; n += kTileVectors * kLanes) {
    const int64_t vectors = std::min<int64_t>(kTileVectors, (columns - n) / kLanes);
    for (int64_t p = 0, m = 0; p < parts; ++p) {
      const int count = static_cast<int>(rows * (p + 1) / parts - m);  // even parts: no thin last one
      const float* a0 = a + m * lda;
      float* c0 = c + m * ldc + n;
      switch (vectors) {
        case 1:
          tile_of<1>(count, depth, a0, lda, b + n, ldb, c0, ldc, accumulate);
          break;
        case 2:
          tile_of<2>(count, depth, a0, lda, b + n, ldb, c0, ldc, accumulate);
          break;
#if !defined(__AVX2__) || defined(__AVX512F__)
        case 3:
          tile_of<3>(count, depth, a0, lda, b + n, ldb, c0, ldc, accumulate);
          break;
        case 4:
          tile_of<4>(count, depth, a0, lda, b + n, ldb, c0, ldc, accumulate);
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

struct Shape {
  int64_t batch, height, width, heads, dim, side;
  bool windows;
  int64_t lanes() const { return round_up(side, kLanes); }
  int64_t keys() const { return side * lanes(); }
  int64_t columns() const { return round_up(dim, kLanes); }
  int64_t key_rows_per_block() const { return std::max<int64_t>(1, std::min(side, kKeysPerBlock / lanes())); }
  int64_t queries() const { return std::max(side, kQueriesPerBlock); }
  int64_t table_width() const { return round_up(2 * side - 1, kLanes) + lanes(); }
};

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

// One head of one window: pointers at its head's first value, tokens `stride` floats apart.
struct Window {
  const float *q, *k, *v;        // of token (0, 0) of the window
  const float *pad_k, *pad_v;    // [dim], what stands beyond the image's edge
  float* out;
  int64_t row_stride, stride;    // of q, k, v in floats
  int64_t out_row_stride, out_stride;
  int64_t real_h, real_w;        // tokens of the window that lie in the image
};

// keys: [dim, side · lanes], transposed; values: [side · lanes, columns]. Lanes beyond the side are zero.
void pack(const Shape& s, const Window& w, float* keys, float* values) {
  const int64_t lanes = s.lanes(), total = s.keys(), columns = s.columns();
  for (int64_t y = 0; y < s.side; ++y) {
    for (int64_t x = 0; x < lanes; ++x) {
      const int64_t t = y * lanes + x;
      const bool real = y < w.real_h && x < w.real_w;
      const float* k = real ? w.k + y * w.row_stride + x * w.stride : w.pad_k;
      const float* v = real ? w.v + y * w.row_stride + x * w.stride : w.pad_v;
      float* row = values + t * columns;
      if (x >= s.side) {
        for (int64_t d = 0; d < s.dim; ++d) keys[d * total + t] = 0;
        std::fill(row, row + columns, 0.0f);
        continue;
      }
      for (int64_t d = 0; d < s.dim; ++d) keys[d * total + t] = k[d];
      std::copy(v, v + s.dim, row);
      std::fill(row + s.dim, row + columns, 0.0f);
    }
  }
}

// The table transposed, back to front, times √dim since queries come scaled: [dim, table_width].
void pack_table(const Shape& s, const float* table, float* packed) {
  const int64_t width = s.table_width(), offsets = 2 * s.side - 1;
  const float factor = std::sqrt(static_cast<float>(s.dim));
  for (int64_t d = 0; d < s.dim; ++d)
    for (int64_t j = 0; j < width; ++j)
      packed[d * width + j] = j < offsets ? table[(offsets - 1 - j) * s.dim + d] * factor : 0.0f;
}

// Adds the relative position to a row of logits and returns the largest; keys come in rows of `lanes`.
inline float add_position(float* logits, int64_t rows, int64_t lanes, const float* by_row, const float* by_lane) {
  Vec best = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t y = 0; y < rows; ++y) {
    const Vec b = broadcast(by_row[y]);
    for (int64_t x = 0; x < lanes; x += kLanes) {
      float* p = logits + y * lanes + x;
      const Vec value = load(p) + b + load(by_lane + x);
      best = larger(best, value);
      store(p, value);
    }
  }
  return largest_of(best);
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

struct Buffers {
  float *keys, *values, *queries, *by_row, *by_lane, *logits, *output, *peak, *sum;
};

int64_t buffer_floats(const Shape& s) {
  const int64_t m = s.queries();
  return s.keys() * (s.dim + s.columns()) +
         m * (s.dim + 2 * s.lanes() + s.key_rows_per_block() * s.lanes() + s.columns() + 2) + 16 * kLanes;
}

Buffers divide(const Shape& s, float* memory) {
  const int64_t m = s.queries();
  Buffers b;
  float* p = memory;
  auto take = [&p](int64_t n) {
    float* start = p;
    p += round_up(n, kLanes);
    return start;
  };
  b.keys = take(s.keys() * s.dim);
  b.values = take(s.keys() * s.columns());
  b.queries = take(m * s.dim);
  b.by_row = take(m * s.lanes());
  b.by_lane = take(m * s.lanes());
  b.logits = take(m * s.key_rows_per_block() * s.lanes());
  b.output = take(m * s.columns());
  b.peak = take(m);
  b.sum = take(m);
  return b;
}

// Relative position of queries in rows first … first + rows of the window, or zero where there is none.
void positions(const Shape& s, const Window& w, int64_t first, int64_t rows, const float* table_h,
               const float* table_w, const Buffers& b) {
  const int64_t lanes = s.lanes(), width = s.table_width(), m = rows * w.real_w;
  if (table_h == nullptr) {
    std::fill(b.by_row, b.by_row + m * lanes, 0.0f);
    std::fill(b.by_lane, b.by_lane + m * lanes, 0.0f);
  } else {
    for (int64_t y = 0; y < rows; ++y)
      multiply(w.real_w, lanes, s.dim, b.queries + y * w.real_w * s.dim, s.dim, table_h + s.side - 1 - (first + y),
               width, b.by_row + y * w.real_w * lanes, lanes, false);
    for (int64_t x = 0; x < w.real_w; ++x)
      multiply(rows, lanes, s.dim, b.queries + x * s.dim, w.real_w * s.dim, table_w + s.side - 1 - x, width,
               b.by_lane + x * lanes, w.real_w * lanes, false);
  }
  for (int64_t i = 0; i < m; ++i)
    std::fill(b.by_lane + i * lanes + s.side, b.by_lane + (i + 1) * lanes,
              -std::numeric_limits<float>::infinity());
}

void attend_rows(const Shape& s, const Window& w, int64_t first, int64_t rows, const float* table_h,
                 const float* table_w, const Buffers& b) {
  const int64_t lanes = s.lanes(), columns = s.columns(), m = rows * w.real_w;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
  for (int64_t i = 0; i < m; ++i) {
    const float* q = w.q + (first + i / w.real_w) * w.row_stride + i % w.real_w * w.stride;
    for (int64_t d = 0; d < s.dim; ++d) b.queries[i * s.dim + d] = q[d] * scale;
  }
  positions(s, w, first, rows, table_h, table_w, b);
  const int64_t step = s.key_rows_per_block();
  for (int64_t y = 0; y < s.side; y += step) {
    const int64_t key_rows = std::min(step, s.side - y), count = key_rows * lanes;
    multiply(m, count, s.dim, b.queries, s.dim, b.keys + y * lanes, s.keys(), b.logits, count, false);
    for (int64_t i = 0; i < m; ++i) {
      float* row = b.logits + i * count;
      float peak = add_position(row, key_rows, lanes, b.by_row + i * lanes + y, b.by_lane + i * lanes);
      if (y > 0) {
        peak = std::max(peak, b.peak[i]);
        const float shrink = std::exp(b.peak[i] - peak);
        b.sum[i] *= shrink;
        for (int64_t d = 0; d < columns; ++d) b.output[i * columns + d] *= shrink;
      } else {
        b.sum[i] = 0;
      }
      b.peak[i] = peak;
      b.sum[i] += exponentials(row, count, peak);
    }
    multiply(m, columns, count, b.logits, count, b.values + y * lanes * columns, columns, b.output, columns, y > 0);
  }
  for (int64_t i = 0; i < m; ++i) {
    float* out = w.out + (first + i / w.real_w) * w.out_row_stride + i % w.real_w * w.out_stride;
    const float norm = 1.0f / b.sum[i];
    for (int64_t d = 0; d < s.dim; ++d) out[d] = b.output[i * columns + d] * norm;
  }
}

Window window_of(const Shape& s, const float* qkv, const float* pad, float* out, int64_t index, int64_t head) {
  const int64_t across = (s.width + s.side - 1) / s.side, down = (s.height + s.side - 1) / s.side;
  const int64_t image = index / (across * down), y = index / across % down * s.side, x = index % across * s.side;
  const int64_t channels = s.heads * s.dim;
  const int64_t token = (image * s.height + y) * s.width + x;
  Window w;
  w.q = qkv + token * 3 * channels + head * s.dim;
  w.k = w.q + channels;
  w.v = w.k + channels;
  w.pad_k = pad == nullptr ? nullptr : pad + channels + head * s.dim;
  w.pad_v = pad == nullptr ? nullptr : w.pad_k + channels;
  w.out = out + token * channels + head * s.dim;
  w.stride = 3 * channels;
  w.row_stride = w.stride * s.width;
  w.out_stride = channels;
  w.out_row_stride = channels * s.width;
  w.real_h = std::min(s.side, s.height - y);
  w.real_w = std::min(s.side, s.width - x);
  return w;
}

}  // namespace

// qkv [batch, height, width, 3, heads, dim]; pad [3, heads, dim] or null; tables [2·side − 1, dim] or null;
// out [batch, height, width, heads, dim]. window 0 stands for the whole, then square, grid.
// Returns 0, or 1 for sizes that do not fit each other.
DFQSAM_API int dfqsam_attention(const float* qkv, const float* pad, const float* table_h, const float* table_w,
                                float* out, int64_t batch, int64_t height, int64_t width, int64_t heads,
                                int64_t dim, int64_t window) {
  if (batch < 0 || height < 1 || width < 1 || heads < 1 || dim < 1 || window < 0) return 1;
  if (window == 0 && height != width) return 1;
  if ((table_h == nullptr) != (table_w == nullptr)) return 1;
  const Shape s{batch, height, width, heads, dim, window ? window : height, window != 0};
  const bool padded = height % s.side != 0 || width % s.side != 0;
  if (padded && pad == nullptr) return 1;
  const int64_t windows = batch * ((height + s.side - 1) / s.side) * ((width + s.side - 1) / s.side);

  static thread_local Scratch table_memory;
  float *packed_h = nullptr, *packed_w = nullptr;
  if (table_h != nullptr) {
    packed_h = table_memory.take(2 * s.dim * s.table_width());
    packed_w = packed_h + s.dim * s.table_width();
    pack_table(s, table_h, packed_h);
    pack_table(s, table_w, packed_w);
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < windows * heads; ++task) {
    static thread_local Scratch memory;
    const Buffers b = divide(s, memory.take(buffer_floats(s)));
    const Window w = window_of(s, qkv, pad, out, task / heads, task % heads);
    pack(s, w, b.keys, b.values);
    const int64_t step = std::max<int64_t>(1, kQueriesPerBlock / w.real_w);
    for (int64_t y = 0; y < w.real_h; y += step)
      attend_rows(s, w, y, std::min(step, w.real_h - y), packed_h, packed_w, b);
  }
  return 0;
}
