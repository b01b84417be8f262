// Included by each instruction set's file, into a namespace of its own, after its vectors: Vec and its kLanes of 32
// bits, kRows and kVectors of a tile, zero, load, store, spread (4 bytes to all lanes) and its products. DFQSAM_CENTRE is
// what its rows are less than given.

constexpr int kColumns = kLanes * kVectors;
constexpr int64_t kWeights = kColumns * kStep;  // bytes of a panel's weights for one step

#define DFQSAM_INLINE inline __attribute__((always_inline))
#define DFQSAM_LAMBDA __attribute__((always_inline))

template <int I>
struct At {
  static constexpr int value = I;
};

template <int... I, typename F>
DFQSAM_INLINE void each(std::integer_sequence<int, I...>, const F& f) {
  (f(At<I>{}), ...);
}

// f for 0 … N − 1, written out: sums only stay in registers where each has a name.
template <int N, typename F>
DFQSAM_INLINE void each(const F& f) {
  each(std::make_integer_sequence<int, N>{}, f);
}

// Keeps the compiler from adding products to one another first, for which there are not registers enough.
DFQSAM_INLINE void keep(Vec& v) { __asm__("" : DFQSAM_REGISTER(v)); }

template <int R>
struct Sum {
  Vec v[R][kVectors];
};

template <int R>
DFQSAM_INLINE void clear(Sum<R>& sums) {
  each<R>([&](auto r) DFQSAM_LAMBDA { each<kVectors>([&](auto j) DFQSAM_LAMBDA { sums.v[r.value][j.value] = zero(); }); });
}

// One step: `f(sum, row, weights)` for each pair of a row and a vector of columns.
template <int R, typename F>
DFQSAM_INLINE void step(Sum<R>& sums, const uint8_t* rows, int64_t stride, const void* weights, const F& f) {
  Vec w[kVectors];
  each<kVectors>([&](auto j) DFQSAM_LAMBDA { w[j.value] = load(static_cast<const uint8_t*>(weights) + 4 * j.value * kLanes); });
  each<R>([&](auto r) DFQSAM_LAMBDA {
    const Vec x = spread(rows + r.value * stride);
    each<kVectors>([&](auto j) DFQSAM_LAMBDA {
      f(sums.v[r.value][j.value], x, w[j.value]);
      keep(sums.v[r.value][j.value]);
    });
  });
}

// f(sum, place) for each sum and its place in the tile's.
template <int R, typename F>
DFQSAM_INLINE void finish(Sum<R>& sums, int32_t* places, const F& f) {
  each<R>([&](auto r) DFQSAM_LAMBDA {
    each<kVectors>([&](auto j) DFQSAM_LAMBDA { f(sums.v[r.value][j.value], places + r.value * kColumns + j.value * kLanes, r, j); });
  });
}

#if DFQSAM_DOT

template <int R>
void dot(const Tile& t) {
  Sum<R> sums;
  clear(sums);
  auto a = static_cast<const uint8_t*>(t.rows), w = static_cast<const uint8_t*>(t.weights);
  for (int64_t steps = t.blocks * (kBlock / kStep); steps > 0; --steps, a += kStep, w += kWeights)
    step(sums, a, t.stride, w, [](Vec& sum, Vec x, Vec y) DFQSAM_LAMBDA { sum = dot4(sum, x, y); });
  finish(sums, t.sums, [](Vec sum, int32_t* to, auto, auto) DFQSAM_LAMBDA { store(to, sum); });
}

#else

// Adds to what is there already, or begins.
DFQSAM_INLINE void widened(int32_t* sums, Vec v, bool begin) { store(sums, begin ? v : add32(v, load(sums))); }

// Sums of a block each. two(row, weights) adds products of 8 bit to 16; by(block, row, vector) is what a block's sums are
// multiplied by.
template <int R, typename Two, typename By>
DFQSAM_INLINE void by_block(const Tile& t, const Two& two, const By& by) {
  auto a = static_cast<const uint8_t*>(t.rows), w = static_cast<const uint8_t*>(t.weights);
  for (int64_t block = 0; block < t.blocks; ++block) {
    Sum<R> sums;
    each<kBlock / kStep>([&](auto first) DFQSAM_LAMBDA {
      step(sums, a, t.stride, w, [&](Vec& sum, Vec x, Vec y) DFQSAM_LAMBDA {
        sum = decltype(first)::value == 0 ? two(x, y) : add16(sum, two(x, y));
      });
      a += kStep;
      w += kWeights;
    });
    finish(sums, t.sums, [&](Vec sum, int32_t* to, auto r, auto j) DFQSAM_LAMBDA {
      widened(to, two16(sum, by(block, r.value, j.value)), block == 0);
    });
  }
}

template <int R>
void levels(const Tile& t) {
  by_block<R>(
      t, [](Vec x, Vec y) DFQSAM_LAMBDA { return two8(y, x); },
      [&](int64_t block, int r, int) DFQSAM_LAMBDA {
        return spread(t.row_multiplier + r * t.row_multiplier_stride + block * kBlock / kGroup);
      });
}

template <int R>
void pairs(const Tile& t) {
  if (t.blocks_a_sum == 1)
    return by_block<R>(
        t, [](Vec x, Vec y) DFQSAM_LAMBDA { return two8(x, y); },
        [&](int64_t block, int, int j) DFQSAM_LAMBDA {
          return load(t.column_multiplier + block * t.column_step + 2 * j * kLanes);
        });
  auto a = static_cast<const uint8_t*>(t.rows), w = static_cast<const uint8_t*>(t.weights);
  for (int64_t left = t.blocks; left > 0;) {
    const bool begin = left == t.blocks;
    const int64_t now = t.blocks_a_sum < left ? t.blocks_a_sum : left;
    Sum<R> sums;
    clear(sums);
    for (int64_t block = 0; block < now; ++block)
      each<kBlock / kStep>([&](auto) DFQSAM_LAMBDA {
        step(sums, a, t.stride, w, [](Vec& sum, Vec x, Vec y) DFQSAM_LAMBDA { sum = add16(sum, two8(x, y)); });
        a += kStep;
        w += kWeights;
      });
    finish(sums, t.sums, [&](Vec sum, int32_t* to, auto, auto j) DFQSAM_LAMBDA {
      widened(to, two16(sum, load(t.column_multiplier + 2 * j.value * kLanes)), begin);
    });
    left -= now;
  }
}

template <int R>
void wide(const Tile& t) {
  Sum<R> sums;
  clear(sums);
  auto a = static_cast<const uint8_t*>(t.rows), w = static_cast<const uint8_t*>(t.weights);
  for (int64_t left = t.blocks * (kBlock / 2); left > 0; --left, a += 4, w += kWeights)
    step(sums, a, t.stride, w, [](Vec& sum, Vec x, Vec y) DFQSAM_LAMBDA { sum = add32(sum, two16(x, y)); });
  finish(sums, t.sums, [](Vec sum, int32_t* to, auto, auto) DFQSAM_LAMBDA { store(to, sum); });
}

#endif

template <int R>
void multiply_rows([[maybe_unused]] Sums how, const Tile& tile) {
#if DFQSAM_DOT
  dot<R>(tile);
#else
  if (how == Sums::kPairs)
    pairs<R>(tile);
  else if (how == Sums::kLevels)
    levels<R>(tile);
  else
    wide<R>(tile);
#endif
}

template <int R>
void multiply_up_to(Sums how, int rows, const Tile& tile) {
  if (rows == R) return multiply_rows<R>(how, tile);
  if constexpr (R > 1) multiply_up_to<R - 1>(how, rows, tile);
}

void multiply(Sums how, int rows, const Tile& tile) { multiply_up_to<kRows>(how, rows, tile); }

// What a sum becomes, each rounding as the reference has it: the scales' product, then the value's, then the bias.
DFQSAM_INLINE float ended(const Ending& e, int32_t sum, int32_t term, int32_t zero_point, float scale, int64_t n) {
  return static_cast<float>(sum + term - zero_point * e.weight_sum[n]) * (scale * e.weight_scale[n]) + e.bias[n];
}

template <bool kAdd>
DFQSAM_INLINE void end_rows(const Ending& e, int64_t columns) {
  for (int r = 0; r < e.rows; ++r) {
    const int32_t* sums = e.sums + r * kColumns;
    const int range = e.one_range ? 0 : r;
    const int32_t term = e.term == nullptr ? 0 : e.term[r];
    const int32_t zero_point = (e.zero_point == nullptr ? 0 : e.zero_point[range]) - DFQSAM_CENTRE;
    const float scale = e.scale[range];
    float* out = e.out + r * e.out_stride;
#pragma GCC ivdep
    for (int64_t n = 0; n < columns; ++n) {
      const float value = ended(e, sums[n], term, zero_point, scale, n);
      out[n] = kAdd ? out[n] + value : value;
    }
  }
}

void end(const Ending& e) {
  // A whole panel has a width that the compiler knows.
  if (e.columns == kColumns)
    e.add ? end_rows<true>(e, kColumns) : end_rows<false>(e, kColumns);
  else
    e.add ? end_rows<true>(e, e.columns) : end_rows<false>(e, e.columns);
}
