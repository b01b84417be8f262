// 8-bit products into 16-bit sums, and 16-bit ones into 32 bit: any processor since 2013, by registers of 256 bits.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "product_kernels.h"

namespace dfqsam {

#if defined(__AVX2__)

namespace {

using Vec = __m256i;
constexpr int kLanes = 8, kRows = 6, kVectors = 2;  // 12 sums, 2 weights, a row and a product: all 16 registers

inline Vec zero() { return _mm256_setzero_si256(); }
inline Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const Vec*>(p)); }
inline void store(void* p, Vec v) { _mm256_storeu_si256(static_cast<Vec*>(p), v); }
inline Vec spread(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}
inline Vec add16(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
inline Vec add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
inline Vec two8(Vec without_sign, Vec with_sign) { return _mm256_maddubs_epi16(without_sign, with_sign); }
inline Vec two16(Vec a, Vec b) { return _mm256_madd_epi16(a, b); }

#define DFQSAM_DOT 0
#define DFQSAM_CENTRE 0
#define DFQSAM_REGISTER "+x"
#include "product_tile.inl"

}  // namespace

const Kernels* avx2() {
  static const Kernels kernels{"avx2", kRows, kColumns, false, multiply, end};
  return __builtin_cpu_supports("avx2") ? &kernels : nullptr;
}

#else

const Kernels* avx2() { return nullptr; }

#endif

}  // namespace dfqsam
