// TinyViT's multi-head attention in float32: small windows, and a learned bias for each distance of two tokens.
//
// One task is one head of one window, all of whose logits to a few queries fit in cache. Keys lie one after
// another, row by row. A table holds for each column of a query the biases of all rows that can lie above and
// below it, so that those of a query are a part of it, read in one piece and never stored as a matrix.

#include <cmath>
#include <cstdlib>
#include <limits>

#include "product.h"

namespace {

constexpr int64_t kQueriesPerBlock = 28;

struct Shape {
  int64_t height, width, heads, dim, side;
  int64_t keys() const { return side * side; }
  int64_t lanes() const { return round_up(keys(), kLanes); }
  int64_t columns() const { return round_up(dim, kLanes); }
  int64_t offsets() const { return 2 * side - 1; }
  // Of one head; the last vector of the last query reads beyond the biases.
  int64_t table() const { return side * offsets() * side + kLanes; }
};

struct Buffers {
  float *keys, *values, *queries, *logits, *output;
};

// Divides memory, or, without any, only counts the floats it takes.
int64_t divide(const Shape& s, float* memory, Buffers* b) {
  Division take{memory};
  b->keys = take(round_up(s.lanes(), kPanel) * s.dim);
  b->values = take(s.keys() * s.columns());
  b->queries = take(kQueriesPerBlock * s.dim);
  b->logits = take(kQueriesPerBlock * s.lanes());
  b->output = take(kQueriesPerBlock * s.columns());
  return take.used;
}

// biases [side, side] by distance in rows and columns, to [query's column, offset in rows, key's column].
void pack_biases(const Shape& s, const float* biases, float* table) {
  for (int64_t x = 0; x < s.side; ++x)
    for (int64_t r = 0; r < s.offsets(); ++r)
      for (int64_t c = 0; c < s.side; ++c)
        *table++ = biases[std::abs(r - (s.side - 1)) * s.side + std::abs(c - x)];
  std::fill_n(table, kLanes, 0.0f);
}

// One head of one window.
struct Window {
  const float* qkv;  // of its first token: [q, k, v] of dim floats each
  const float* pad;  // [3, dim], what stands beyond the image's edge
  float* out;        // one of these two is null
  uint8_t* levels;
  int64_t stride, out_stride, width;  // from token to token in floats; tokens in the image's row
  int64_t real_h, real_w;             // tokens of the window that lie in the image
};

inline void copy(const float* from, int64_t count, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(to + d, load(from + d));
  for (; d < count; ++d) to[d] = from[d];
}

// keys: [panels, dim, kPanel], transposed, beyond the last one anything; values: [keys, columns].
void pack(const Shape& s, const Window& w, const Buffers& b) {
  const float* k[kLanes];
  int64_t t = 0;  // the next key; its lane is that within the vector
  const auto transposed = [&] {
    const int64_t first = (t - 1) / kLanes * kLanes;
    float* place = b.keys + first / kPanel * kPanel * s.dim + first % kPanel;
    int64_t d = 0;
    for (; d + kLanes <= s.dim; d += kLanes) {
      Vec square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) square[lane] = load(k[lane] + d);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(place + (d + i) * kPanel, square[i]);
    }
    for (; d < s.dim; ++d)
      for (int lane = 0; lane < kLanes; ++lane) place[d * kPanel + lane] = k[lane][d];
  };
  for (int64_t y = 0; y < s.side; ++y)
    for (int64_t x = 0; x < s.side; ++x) {
      const bool real = y < w.real_h && x < w.real_w;
      const float* token = real ? w.qkv + (y * w.width + x) * w.stride : w.pad;
      float* row = b.values + t * s.columns();
      copy(token + 2 * s.dim, s.dim, row);
      std::fill(row + s.dim, row + s.columns(), 0.0f);
      k[t % kLanes] = token + s.dim;
      if (++t % kLanes == 0) transposed();
    }
  if (t % kLanes != 0) {
    for (int64_t lane = t % kLanes; lane < kLanes; ++lane) k[lane] = k[0];
    transposed();
  }
}

// Adds biases to a row of logits, and `tail` to its last vector; returns the largest.
inline float add_biases(float* logits, int64_t lanes, const float* biases, Vec tail) {
  const int64_t last = lanes - kLanes;
  Vec best = load(logits + last) + load(biases + last) + tail;
  store(logits + last, best);
  for (int64_t t = 0; t < last; t += kLanes) {
    const Vec value = load(logits + t) + load(biases + t);
    best = larger(best, value);
    store(logits + t, value);
  }
  return largest_of(best);
}

// −∞ in the lanes of the last vector that are no keys.
Vec tail_of(const Shape& s) {
  Vec tail{};
  for (int lane = 0; lane < kLanes; ++lane)
    if (s.lanes() - kLanes + lane >= s.keys()) tail[lane] = -std::numeric_limits<float>::infinity();
  return tail;
}

// Some real tokens of the window ask, `count` from the one of number `first` on.
void attend(const Shape& s, const Window& w, int64_t first, int64_t count, const float* table, const Levels& to,
            const Buffers& b) {
  const Vec tail = tail_of(s);
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
  int64_t places[kQueriesPerBlock];  // in the image, from the window's first token
  const float* biases[kQueriesPerBlock];
  for (int64_t i = 0, y = first / w.real_w, x = first % w.real_w; i < count; ++i) {
    places[i] = y * w.width + x;
    biases[i] = table + (x * s.offsets() + s.side - 1 - y) * s.side;
    const float* q = w.qkv + places[i] * w.stride;
    for (int64_t d = 0; d < s.dim; ++d) b.queries[i * s.dim + d] = q[d] * scale;
    if (++x == w.real_w) ++y, x = 0;
  }
  multiply(count, s.lanes(), s.dim, b.queries, s.dim, b.keys, kPanel, kPanel * s.dim, b.logits, s.lanes(), false);
  float sums[kQueriesPerBlock];
  for (int64_t i = 0; i < count; ++i) {
    float* row = b.logits + i * s.lanes();
    const float peak = add_biases(row, s.lanes(), biases[i], tail);
    sums[i] = exponentials(row, s.lanes(), peak);
  }
  multiply(count, s.columns(), s.keys(), b.logits, s.lanes(), b.values, s.columns(), kPanel, b.output, s.columns(),
           false);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = places[i] * w.out_stride;
    const float norm = 1.0f / sums[i];
    float* output = b.output + i * s.columns();
    for (int64_t d = 0; d < s.dim; ++d) output[d] *= norm;
    if (w.levels == nullptr)
      copy(output, s.dim, w.out + place);
    else
      for (int64_t d = 0; d < s.dim; ++d) w.levels[place + d] = to.of(output[d]);
  }
}

Window window_of(const Shape& s, const float* qkv, const float* pad, float* out, uint8_t* levels, int64_t index,
                 int64_t head) {
  const int64_t across = (s.width + s.side - 1) / s.side, down = (s.height + s.side - 1) / s.side;
  const int64_t image = index / (across * down), y = index / across % down * s.side, x = index % across * s.side;
  const int64_t channels = s.heads * s.dim, token = (image * s.height + y) * s.width + x;
  Window w;
  w.qkv = qkv + token * 3 * channels + head * 3 * s.dim;
  w.pad = pad == nullptr ? nullptr : pad + head * 3 * s.dim;
  w.out = out == nullptr ? nullptr : out + token * channels + head * s.dim;
  w.levels = levels == nullptr ? nullptr : levels + token * channels + head * s.dim;
  w.stride = 3 * channels;
  w.out_stride = channels;
  w.width = s.width;
  w.real_h = std::min(s.side, s.height - y);
  w.real_w = std::min(s.side, s.width - x);
  return w;
}

}  // namespace

// qkv [batch, height, width, heads, 3, dim]; pad [heads, 3, dim] or null; biases [heads, side, side] by distance
// in rows and columns; the result [batch, height, width, heads, dim] goes to out, or, where that is null, as
// integers to levels. Returns 0, or 1 for sizes that do not fit each other.
DFQSAM_API int dfqsam_window_attention(const float* qkv, const float* pad, const float* biases, float* out,
                                       uint8_t* levels, int64_t batch, int64_t height, int64_t width,
                                       int64_t heads, int64_t dim, int64_t side, float inverse_scale,
                                       float zero_point, float highest) {
  if (batch < 0 || height < 1 || width < 1 || heads < 1 || dim < 1 || side < 1) return 1;
  if ((out == nullptr) == (levels == nullptr)) return 1;
  if ((height % side != 0 || width % side != 0) && pad == nullptr) return 1;
  const Levels to{inverse_scale, zero_point, highest};
  const Shape s{height, width, heads, dim, side};
  static thread_local Scratch table_memory;
  float* tables = table_memory.take(heads * s.table());
  for (int64_t head = 0; head < heads; ++head)
    pack_biases(s, biases + head * s.keys(), tables + head * s.table());
  const int64_t windows = batch * ((height + side - 1) / side) * ((width + side - 1) / side);
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < windows * heads; ++task) {
    static thread_local Scratch memory;
    Buffers b;
    divide(s, memory.take(divide(s, nullptr, &b)), &b);
    const Window w = window_of(s, qkv, pad, out, levels, task / heads, task % heads);
    pack(s, w, b);
    const int64_t queries = w.real_h * w.real_w, blocks = (queries + kQueriesPerBlock - 1) / kQueriesPerBlock;
    for (int64_t n = 0; n < blocks; ++n) {
      const int64_t first = queries * n / blocks;  // even blocks: no thin last one
      attend(s, w, first, queries * (n + 1) / blocks - first, tables + task % heads * s.table(), to, b);
    }
  }
  return 0;
}
