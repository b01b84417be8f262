// The same as product_avx2.cpp by registers of 512 bits, for processors that have those but no VNNI.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "product_kernels.h"

namespace dfqsam {

#if defined(__AVX512BW__)

namespace {

using Vec = __m512i;
constexpr int kLanes = 16, kRows = 12, kVectors = 2;  // 24 sums, 2 weights, a row and a product, of 32 registers

inline Vec zero() { return _mm512_setzero_si512(); }
inline Vec load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Vec v) { _mm512_storeu_si512(p, v); }
inline Vec spread(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}
inline Vec add16(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
inline Vec add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
inline Vec two8(Vec without_sign, Vec with_sign) { return _mm512_maddubs_epi16(without_sign, with_sign); }
inline Vec two16(Vec a, Vec b) { return _mm512_madd_epi16(a, b); }

#define DFQSAM_DOT 0
#define DFQSAM_CENTRE 0
#define DFQSAM_REGISTER "+v"
#include "product_tile.inl"

}  // namespace

const Kernels* avx512() {
  static const Kernels kernels{"avx512", kRows, kColumns, false, multiply, end};
  return __builtin_cpu_supports("avx512bw") ? &kernels : nullptr;
}

#else

const Kernels* avx512() { return nullptr; }

#endif

}  // namespace dfqsam
