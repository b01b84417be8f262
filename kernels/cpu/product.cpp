// A layer's integer product: how its weights are packed, how its rows are laid out, and its threads.
//
// Of each instruction set the kernels know a tile; everything else is here once. Sums are exact, so that neither the
// instruction set nor the number of threads changes a bit of what comes out.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "product_kernels.h"

#define DFQSAM_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace dfqsam;

// What the product knows of a layer; made once, when it is loaded.
struct Packed {
  const Kernels* kernels;
  Sums how;
  int64_t outputs, depth, panels, blocks, blocks_a_sum, column_step;
  int64_t panel_bytes;
  std::vector<int16_t> column_multiplier;  // of all panels
  std::vector<int32_t> weight_sum;         // padded to whole panels, as the next two
  std::vector<float> weight_scale, bias;
  std::vector<uint8_t> memory;  // a line of cache more than needed
  uint8_t* weights;             // [panels][panel_bytes]
};

constexpr int64_t kLine = 64;
constexpr int64_t kRowsInCache = 96 << 10;  // bytes of rows that stay near while panels go by

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

const Kernels* by_name(const char* name) {
#if defined(__x86_64__)
  for (const Kernels* k : {avx512_vnni(), avx_vnni(), avx512(), avx2()})
#else
  for (const Kernels* k : {neon_dot()})
#endif
    if (k != nullptr && std::strcmp(name, k->name) == 0) return k;
  return nullptr;
}

// Memory for rows in another layout, kept between calls.
uint8_t* scratch(int64_t bytes) {
  static thread_local std::vector<uint8_t> memory;
  if (static_cast<int64_t>(memory.size()) < bytes) memory.resize(bytes);
  return memory.data();
}

}  // namespace

// Whether there are kernels of a name, and the processor has what they need.
DFQSAM_API int dfqsam_has(const char* name) { return by_name(name) != nullptr; }

// Seconds of one multiplication in a whole tile whose numbers stay in the first cache: no product can be faster.
DFQSAM_API double dfqsam_tile_seconds(const char* name, int how) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kBlocks = 16, kRepeats = 2000;
  const Kernels* kernels = by_name(name);
  if (kernels == nullptr) return -1;
  const int64_t depth = kBlocks * kBlock * (static_cast<Sums>(how) == Sums::kWide ? 2 : 1);
  const std::vector<uint8_t> rows(kMostRows * depth, 1), weights(kMostColumns * depth, 1);
  const std::vector<int16_t> by_column(2 * kMostColumns, 1);
  const std::vector<int32_t> by_row(kMostRows * kBlocks, 0x10001);
  alignas(kLine) int32_t sums[kMostRows * kMostColumns];
  const Tile tile{rows.data(), depth, weights.data(), kBlocks, kBlocks, by_column.data(), 0, by_row.data(), kBlocks, sums};
  double least = 1e9;
  for (int turn = 0; turn < 5; ++turn) {
    const auto begin = Clock::now();
    for (int64_t i = 0; i < kRepeats; ++i) kernels->multiply(static_cast<Sums>(how), kernels->rows, tile);
    least = std::min(least, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return least / (static_cast<double>(kRepeats) * kernels->rows * kernels->columns * kBlocks * kBlock);
}

// Packs a layer for the instruction set of a name. weight [outputs, depth]; of kPairs with multipliers [outputs, groups of 32] it holds what these
// multiply. largest is the greatest value of a row, by which the least number of widenings is found. Returns null
// where the processor has none of the instructions.
DFQSAM_API Packed* dfqsam_pack(const char* name, int how, const int8_t* weight, const uint8_t* multiplier,
                               const float* weight_scale, const float* bias, int64_t outputs, int64_t depth,
                               int64_t largest) {
  const Kernels* kernels = by_name(name);
  if (kernels == nullptr) return nullptr;
  auto p = std::make_unique<Packed>();
  p->kernels = kernels;
  p->outputs = outputs;
  p->depth = depth;
  p->how = kernels->dot ? Sums::kDot : static_cast<Sums>(how);
  const int64_t columns = kernels->columns, padded = up(depth, kBlock);
  p->panels = up(outputs, columns) / columns;
  p->blocks = padded / kBlock;
  const int64_t size = p->how == Sums::kWide ? 2 : 1, together = p->how == Sums::kWide ? 2 : kStep;
  p->panel_bytes = padded * columns * size;
  p->memory.resize(p->panels * p->panel_bytes + kLine);
  p->weights = reinterpret_cast<uint8_t*>(up(reinterpret_cast<int64_t>(p->memory.data()), kLine));
  p->weight_sum.resize(p->panels * columns);
  p->weight_scale.resize(p->panels * columns);
  p->bias.resize(p->panels * columns);
  std::copy_n(weight_scale, outputs, p->weight_scale.begin());
  std::copy_n(bias, outputs, p->bias.begin());

  int64_t greatest = 1;
  for (int64_t i = 0; i < outputs * depth; ++i) greatest = std::max<int64_t>(greatest, std::abs(int{weight[i]}));
  const int64_t blocks_a_sum = 32767 / (2 * largest * greatest * (kBlock / kStep));
  p->blocks_a_sum = multiplier != nullptr ? 1 : std::max<int64_t>(1, std::min(p->blocks, blocks_a_sum));
  if (p->how == Sums::kPairs && multiplier == nullptr && blocks_a_sum == 0) return nullptr;

  const int offset = p->how == Sums::kLevels ? 128 : 0;
  for (int64_t n = 0; n < p->panels * columns; ++n) {
    uint8_t* panel = p->weights + n / columns * p->panel_bytes;
    const int64_t column = n % columns;
    int32_t sum = 0;
    for (int64_t k = 0; k < padded; ++k) {
      const bool there = n < outputs && k < depth;
      const int value = there ? weight[n * depth + k] : 0;
      const int by = there && multiplier != nullptr ? multiplier[n * up(depth, kGroup) / kGroup + k / kGroup] : 1;
      sum += value * by;
      const int64_t at = (k / together * columns + column) * together + k % together;
      if (size == 2)
        reinterpret_cast<int16_t*>(panel)[at] = static_cast<int16_t>(value);
      else
        panel[at] = static_cast<uint8_t>(value + offset);
    }
    p->weight_sum[n] = sum;
  }
  if (p->how == Sums::kPairs) {
    const int64_t widenings = multiplier == nullptr ? 1 : p->blocks;
    p->column_step = multiplier == nullptr ? 0 : 2 * columns;
    p->column_multiplier.assign(p->panels * widenings * 2 * columns, 1);
    for (int64_t n = 0; multiplier != nullptr && n < outputs; ++n)
      for (int64_t b = 0; b < widenings; ++b) {
        int16_t* pair = &p->column_multiplier[((n / columns * widenings + b) * columns + n % columns) * 2];
        pair[0] = pair[1] = multiplier[n * up(depth, kGroup) / kGroup + b * kBlock / kGroup];
      }
  }
  return p.release();
}

DFQSAM_API void dfqsam_unpack(Packed* packed) { delete packed; }

// out [count, outputs] = (sums − zero_point·Σ weight + term)·(scale·weight_scale) + bias, added to what is there
// where `add` says so. rows [count, depth] of 8 bit; row_multiplier [count, groups of 32] as pairs, of kLevels; scale
// [count], and zero_point and term likewise, each null for 0. With `one_range` scale and zero_point are one number.
DFQSAM_API void dfqsam_product(const Packed* packed, const uint8_t* rows, const float* scale,
                               const int32_t* zero_point, const int32_t* row_multiplier, const int32_t* term,
                               float* out, int64_t count, int one_range, int add) {
  const Packed& p = *packed;
  const Kernels& kernels = *p.kernels;
  const int64_t columns = kernels.columns, padded = p.blocks * kBlock, groups = up(p.depth, kGroup) / kGroup;
  const int64_t size = p.how == Sums::kWide ? 2 : 1;
  const bool copied = size == 2 || padded != p.depth;
  const int64_t stride = padded * size;
  uint8_t* copy = copied ? scratch(count * stride) : nullptr;
  const int64_t most = std::max<int64_t>(kernels.rows, kRowsInCache / stride);
  // Equal chunks, or one thread would have all of the short last one's panels.
  const int64_t chunks = std::max<int64_t>(1, (count + most - 1) / most);
  const int64_t chunk = up((count + chunks - 1) / chunks, kernels.rows);

#pragma omp parallel if (count * p.depth * p.outputs > (1 << 18))
  {
    if (copied) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < count; ++r) {
        const uint8_t* from = rows + r * p.depth;
        if (size == 2) {
          auto to = reinterpret_cast<int16_t*>(copy + r * stride);
          for (int64_t k = 0; k < p.depth; ++k) to[k] = from[k];
          std::fill(to + p.depth, to + padded, int16_t{0});
        } else {
          std::memcpy(copy + r * stride, from, p.depth);
          std::memset(copy + r * stride + p.depth, 0, padded - p.depth);
        }
      }
    }
    const uint8_t* laid = copied ? copy : rows;
    alignas(kLine) int32_t sums[kMostRows * kMostColumns];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < chunks * p.panels; ++task) {
      const int64_t first = task / p.panels * chunk, panel = task % p.panels;
      const int64_t last = std::min(count, first + chunk), column = panel * columns;
      // Even parts: no thin last one.
      const int64_t parts = (last - first + kernels.rows - 1) / kernels.rows;
      for (int64_t part = 0, r = first; part < parts; ++part) {
        const int64_t next = first + (last - first) * (part + 1) / parts;
        const int many = static_cast<int>(next - r);
        kernels.multiply(p.how, many,
                         {laid + r * stride, stride, p.weights + panel * p.panel_bytes, p.blocks, p.blocks_a_sum,
                          p.how == Sums::kPairs
                              ? &p.column_multiplier[p.column_step == 0 ? column * 2 : panel * p.blocks * p.column_step]
                              : nullptr,
                          p.column_step, row_multiplier == nullptr ? nullptr : row_multiplier + r * groups, groups,
                          sums});
        const int64_t range = one_range ? 0 : r;
        kernels.end({sums, many, std::min(columns, p.outputs - column), term == nullptr ? nullptr : term + r,
                     zero_point == nullptr ? nullptr : zero_point + range, scale + range, one_range != 0,
                     &p.weight_sum[column], &p.weight_scale[column], &p.bias[column],
                     out + r * p.outputs + column, p.outputs, add != 0});
        r = next;
      }
    }
  }
}
