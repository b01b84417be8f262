// What multiplies a few rows of integers by a panel of columns, for one instruction set each, and the layouts that
// all of them share.
#pragma once

#include <cstdint>

namespace dfqsam {

inline constexpr int64_t kStep = 4;    // values along K that meet in one lane of 32 bits
inline constexpr int64_t kBlock = 16;  // values along K after which 16-bit sums may be widened
inline constexpr int64_t kGroup = 32;  // values of a row that share a multiplier
inline constexpr int kMostRows = 12, kMostColumns = 32;

// How the sums of a product stay exact.
enum class Sums : int {
  kDot = 0,     // unsigned rows · signed weights into 32 bit at once
  kPairs = 1,   // unsigned rows · signed weights into 16 bit, widened after some blocks, by what each column says
  kLevels = 2,  // signed rows · unsigned weights into 16 bit, widened after each block, by what the row's group says
  kWide = 3,    // 16 bit · 16 bit into 32 bit, for what 16-bit sums cannot hold
};

// A few rows times one panel. Weights of a panel: [K / kStep][columns][kStep] bytes; of kWide [K / 2][columns][2] of
// 16 bit. Multipliers are pairs of equal 16-bit numbers, since a lane holds two 16-bit sums of one column.
struct Tile {
  const void* rows;
  int64_t stride;  // bytes from one row to the next
  const void* weights;
  int64_t blocks;  // of kBlock values along K
  int64_t blocks_a_sum;              // kPairs: after how many blocks sums are widened
  const int16_t* column_multiplier;  // kPairs: [blocks][columns][2], or where more than one are added one for all
  int64_t column_step;               // from one block's to the next's; 0 where all are the same
  const int32_t* row_multiplier;   // kLevels: [rows][K / kGroup], pairs
  int64_t row_multiplier_stride;
  int32_t* sums;  // [rows][columns]
};

// What turns sums into floats: (sum + term − zero_point·weight_sum)·(scale·weight_scale) + bias, and where there is
// something to add to, that much more of it.
struct Ending {
  const int32_t* sums;
  int rows;
  int64_t columns;  // of the panel that are the product's
  const int32_t *term, *zero_point;  // of rows; each null: 0
  const float* scale;
  bool one_range;  // scale and zero_point are the first row's for all
  const int32_t* weight_sum;
  const float *weight_scale, *bias;
  float* out;
  int64_t out_stride;
  bool add;
};

// One instruction set.
struct Kernels {
  const char* name;
  int rows, columns;  // of a whole tile
  bool dot;           // has kDot, and needs nothing else
  void (*multiply)(Sums, int rows, const Tile&);
  void (*end)(const Ending&);
};

// Null where the processor lacks it.
const Kernels* avx2();
const Kernels* avx512();
const Kernels* avx_vnni();
const Kernels* avx512_vnni();
const Kernels* neon_dot();

}  // namespace dfqsam
