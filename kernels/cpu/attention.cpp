// SAM's multi-head attention in float32, windows and decomposed relative position included.
//
// One task is one head of one window (or of the whole grid). Keys lie in rows of the window, each padded to
// whole vectors, so that the relative position is one number a row plus one vector a row, added while the
// logits are in cache and never stored as a matrix. Padding of windows costs no queries, and hardly any keys.
// Softmax runs online over blocks of keys, so that memory does not grow with the square of the tokens.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "product.h"

namespace {

constexpr int64_t kKeysPerBlock = 512;
constexpr int64_t kQueriesPerBlock = 32;

struct Shape {
  int64_t batch, height, width, heads, dim, side;
  bool windows;
  int64_t lanes() const { return round_up(side, kLanes); }
  int64_t keys() const { return side * lanes(); }
  int64_t columns() const { return round_up(dim, kLanes); }
  // So many that a block begins where a panel does.
  int64_t key_rows_per_block() const {
    const int64_t unit = kPanel / std::gcd(lanes(), kPanel);
    return std::max(unit, kKeysPerBlock / lanes() / unit * unit);
  }
  // Of one table: wide enough for a whole row of lanes from any offset.
  int64_t table_width() const { return round_up(side - 1 + lanes(), kLanes); }
};

// One head of one window: pointers at its head's first value, tokens `stride` floats apart.
struct Window {
  const float *q, *k, *v;        // of token (0, 0) of the window
  const float *pad_k, *pad_v;    // [dim], what stands beyond the image's edge
  float* out;                    // one of these two is null
  uint8_t* levels;
  int64_t row_stride, stride;    // of q, k, v in floats
  int64_t out_row_stride, out_stride;
  int64_t real_h, real_w;        // tokens of the window that lie in the image
  bool turned;                   // rows and columns changed over, so that few rows hold all real tokens
};

// keys: [panels, dim, kPanel], transposed; values: [real_h · lanes, columns]. Lanes beyond the side are zero.
// In panels, since rows as long as all keys would lie a power of two apart and push each other out of cache.
void pack(const Shape& s, const Window& w, float* keys, float* values) {
  const int64_t total = w.real_h * s.lanes(), columns = s.columns();
  for (int64_t t = 0; t < total; t += kLanes) {
    const float* k[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t y = t / s.lanes(), x = t % s.lanes() + lane;
      const bool real = x < w.real_w;
      const int64_t token = y * w.row_stride + x * w.stride;
      k[lane] = x >= s.side ? nullptr : real ? w.k + token : w.pad_k;
      float* row = values + (t + lane) * columns;
      const int64_t filled = x >= s.side ? 0 : s.dim;
      if (filled) std::copy_n(real ? w.v + token : w.pad_v, s.dim, row);
      std::fill(row + filled, row + columns, 0.0f);
    }
    float* place = keys + t / kPanel * kPanel * s.dim + t % kPanel;
    int64_t d = 0;
    for (; d + kLanes <= s.dim; d += kLanes) {
      Vec square[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) square[lane] = k[lane] ? load(k[lane] + d) : Vec{};
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(place + (d + i) * kPanel, square[i]);
    }
    for (; d < s.dim; ++d)
      for (int lane = 0; lane < kLanes; ++lane) place[d * kPanel + lane] = k[lane] ? k[lane][d] : 0.0f;
  }
}

// Both tables transposed, back to front, times √dim since queries come scaled: [dim, 2 · table_width].
void pack_tables(const Shape& s, const float* table_h, const float* table_w, float* packed) {
  const int64_t width = s.table_width(), offsets = 2 * s.side - 1;
  const float factor = std::sqrt(static_cast<float>(s.dim));
  for (int64_t d = 0; d < s.dim; ++d)
    for (int64_t j = 0; j < 2 * width; ++j) {
      const float* table = j < width ? table_h : table_w;
      const int64_t offset = j % width;
      packed[d * 2 * width + j] = offset < offsets ? table[(offsets - 1 - offset) * s.dim + d] * factor : 0.0f;
    }
}

// Adds the relative position and the mask of lanes to a row of logits; returns the largest.
inline float add_position(float* logits, int64_t rows, int64_t lanes, const float* by_row, const float* by_lane,
                          const float* mask) {
  Vec best = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t x = 0; x < lanes; x += kLanes) {
    const Vec column = load(by_lane + x) + load(mask + x);
    for (int64_t y = 0; y < rows; ++y) {
      float* p = logits + y * lanes + x;
      const Vec value = load(p) + (column + by_row[y]);
      best = larger(best, value);
      store(p, value);
    }
  }
  return largest_of(best);
}

struct Buffers {
  float *keys, *values, *queries, *position, *mask, *row_mask, *logits, *output, *peak, *sum;
};

// Divides memory, or, without any, only counts the floats it takes.
int64_t divide(const Shape& s, float* memory, Buffers* b) {
  const int64_t m = std::max(s.side, kQueriesPerBlock);
  Division take{memory};
  b->keys = take(round_up(s.keys(), kPanel) * s.dim);
  b->values = take(s.keys() * s.columns());
  b->queries = take(m * s.dim);
  b->position = take(m * 2 * s.table_width());
  b->mask = take(s.lanes());
  b->row_mask = take(s.lanes());
  b->logits = take(m * s.key_rows_per_block() * s.lanes());
  b->output = take(m * s.columns());
  b->peak = take(m);
  b->sum = take(m);
  return take.used;
}

// A query's result so far gives way to logits of a higher peak.
inline void rescale(const Buffers& b, int64_t query, int64_t columns, float peak) {
  const float shrink = std::exp(b.peak[query] - peak);
  b.peak[query] = peak;
  b.sum[query] *= shrink;
  for (int64_t d = 0; d < columns; ++d) b.output[query * columns + d] *= shrink;
}

// Σ e^(values + mask − peak) over a few whole vectors, and the peak.
inline float short_sum(const float* values, const float* mask, int64_t lanes, float* peak) {
  Vec best = load(values) + load(mask);
  for (int64_t x = kLanes; x < lanes; x += kLanes) best = larger(best, load(values + x) + load(mask + x));
  *peak = largest_of(best);
  Vec total{};
  for (int64_t x = 0; x < lanes; x += kLanes) total += exponential(load(values + x) + load(mask + x) - *peak);
  return sum_of(total);
}

// Whole rows of padding: their keys and values are the same, so that the sum of e^(qk + row + lane) over them
// is a product of two short sums.
void attend_padding(const Shape& s, const Window& w, int64_t query, const float* by_row, const float* by_lane,
                    const Buffers& b) {
  const float* q = b.queries + query * s.dim;
  float* output = b.output + query * s.columns();
  float row_peak, lane_peak, logit = 0;
  const float by_rows = short_sum(by_row, b.row_mask, s.lanes(), &row_peak);
  const float by_lanes = short_sum(by_lane, b.mask, s.lanes(), &lane_peak);
#pragma omp simd reduction(+ : logit)
  for (int64_t d = 0; d < s.dim; ++d) logit += q[d] * w.pad_k[d];
  logit += row_peak + lane_peak;
  if (logit > b.peak[query]) rescale(b, query, s.columns(), logit);
  const float weight = std::exp(logit - b.peak[query]) * by_rows * by_lanes;
  b.sum[query] += weight;
  for (int64_t d = 0; d < s.dim; ++d) output[d] += weight * w.pad_v[d];
}

void attend_rows(const Shape& s, const Window& w, int64_t first, int64_t rows, const float* tables,
                 const Levels& to, const Buffers& b) {
  const int64_t lanes = s.lanes(), columns = s.columns(), m = rows * w.real_w, width = s.table_width();
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
  for (int64_t i = 0; i < m; ++i) {
    const float* q = w.q + (first + i / w.real_w) * w.row_stride + i % w.real_w * w.stride;
    for (int64_t d = 0; d < s.dim; ++d) b.queries[i * s.dim + d] = q[d] * scale;
  }
  // A query's score for every offset; that of its own place is a matter of where to begin reading.
  if (tables != nullptr)
    multiply(m, 2 * width, s.dim, b.queries, s.dim, tables, 2 * width, kPanel, b.position, 2 * width, false);
  const int64_t step = s.key_rows_per_block();
  const auto by_row = [&](int64_t i) {
    return tables == nullptr ? b.position : b.position + i * 2 * width + s.side - 1 - (first + i / w.real_w);
  };
  const auto by_lane = [&](int64_t i) {
    return tables == nullptr ? b.position : b.position + (i * 2 + 1) * width + s.side - 1 - i % w.real_w;
  };
  for (int64_t y = 0; y < w.real_h; y += step) {
    const int64_t key_rows = std::min(step, w.real_h - y), count = key_rows * lanes;
    multiply(m, count, s.dim, b.queries, s.dim, b.keys + y * lanes * s.dim, kPanel, kPanel * s.dim, b.logits, count,
             false);
    for (int64_t i = 0; i < m; ++i) {
      float* row = b.logits + i * count;
      const float peak = add_position(row, key_rows, lanes, by_row(i) + y, by_lane(i), b.mask);
      if (y == 0) {
        b.peak[i] = peak;
        b.sum[i] = 0;
      } else if (peak > b.peak[i]) {
        rescale(b, i, columns, peak);
      }
      b.sum[i] += exponentials(row, count, b.peak[i]);
    }
    multiply(m, columns, count, b.logits, count, b.values + y * lanes * columns, columns, kPanel, b.output,
             columns, y > 0);
  }
  if (w.real_h < s.side)
    for (int64_t i = 0; i < m; ++i) attend_padding(s, w, i, by_row(i), by_lane(i), b);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t place = (first + i / w.real_w) * w.out_row_stride + i % w.real_w * w.out_stride;
    const float norm = 1.0f / b.sum[i];
    float* output = b.output + i * columns;
    for (int64_t d = 0; d < s.dim; ++d) output[d] *= norm;
    if (w.levels == nullptr)
      std::copy_n(output, s.dim, w.out + place);
    else
      for (int64_t d = 0; d < s.dim; ++d) w.levels[place + d] = to.of(output[d]);
  }
}

Window window_of(const Shape& s, const float* qkv, const float* pad, float* out, uint8_t* levels, int64_t index,
                 int64_t head) {
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
  w.out = out == nullptr ? nullptr : out + token * channels + head * s.dim;
  w.levels = levels == nullptr ? nullptr : levels + token * channels + head * s.dim;
  w.stride = 3 * channels;
  w.row_stride = w.stride * s.width;
  w.out_stride = channels;
  w.out_row_stride = channels * s.width;
  w.real_h = std::min(s.side, s.height - y);
  w.real_w = std::min(s.side, s.width - x);
  w.turned = w.real_w < w.real_h;
  if (w.turned) {
    std::swap(w.real_h, w.real_w);
    std::swap(w.row_stride, w.stride);
    std::swap(w.out_row_stride, w.out_stride);
  }
  return w;
}

}  // namespace

// qkv [batch, height, width, 3, heads, dim]; pad [3, heads, dim] or null; tables [2·side − 1, dim] or null;
// the result [batch, height, width, heads, dim] goes to out, or, where that is null, as integers to levels.
// window 0 stands for the whole, then square, grid.
// Returns 0, or 1 for sizes that do not fit each other.
DFQSAM_API int dfqsam_attention(const float* qkv, const float* pad, const float* table_h, const float* table_w,
                                float* out, uint8_t* levels, int64_t batch, int64_t height, int64_t width,
                                int64_t heads, int64_t dim, int64_t window, float inverse_scale,
                                float zero_point, float highest) {
  if (batch < 0 || height < 1 || width < 1 || heads < 1 || dim < 1 || window < 0) return 1;
  if (window == 0 && height != width) return 1;
  if ((table_h == nullptr) != (table_w == nullptr) || (out == nullptr) == (levels == nullptr)) return 1;
  const Levels to{inverse_scale, zero_point, highest};
  const Shape s{batch, height, width, heads, dim, window ? window : height, window != 0};
  const bool padded = height % s.side != 0 || width % s.side != 0;
  if (padded && pad == nullptr) return 1;
  const int64_t windows = batch * ((height + s.side - 1) / s.side) * ((width + s.side - 1) / s.side);

  static thread_local Scratch table_memory;
  float *tables = nullptr, *turned_tables = nullptr;
  if (table_h != nullptr) {
    const int64_t size = 2 * s.dim * s.table_width();
    tables = table_memory.take(2 * size);
    pack_tables(s, table_h, table_w, tables);
    pack_tables(s, table_w, table_h, tables + size);  // for windows that are turned
    turned_tables = tables + size;
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t task = 0; task < windows * heads; ++task) {
    static thread_local Scratch memory;
    Buffers b;
    divide(s, memory.take(divide(s, nullptr, &b)), &b);
    const Window w = window_of(s, qkv, pad, out, levels, task / heads, task % heads);
    for (int64_t x = 0; x < s.lanes(); ++x) {
      constexpr float kNever = -std::numeric_limits<float>::infinity();
      b.mask[x] = x < s.side ? 0 : kNever;
      b.row_mask[x] = x >= w.real_h && x < s.side ? 0 : kNever;
    }
    if (tables == nullptr) std::fill_n(b.position, 2 * s.table_width(), 0.0f);
    pack(s, w, b.keys, b.values);
    const int64_t step = std::max<int64_t>(1, kQueriesPerBlock / w.real_w);
    for (int64_t y = 0; y < w.real_h; y += step)
      attend_rows(s, w, y, std::min(step, w.real_h - y), w.turned ? turned_tables : tables, to, b);
  }
  return 0;
}
