// Four 8-bit products into each of 8 lanes at once: AVX-VNNI, which desktop processors have without AVX-512.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "product_kernels.h"

namespace dfqsam {

#if defined(__AVXVNNI__)

namespace {

using Vec = __m256i;
constexpr int kLanes = 8, kRows = 6, kVectors = 2;

inline Vec zero() { return _mm256_setzero_si256(); }
inline Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const Vec*>(p)); }
inline void store(void* p, Vec v) { _mm256_storeu_si256(static_cast<Vec*>(p), v); }
inline Vec spread(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}
inline Vec dot4(Vec sums, Vec without_sign, Vec with_sign) {
  return _mm256_dpbusd_avx_epi32(sums, without_sign, with_sign);
}

#define DFQSAM_DOT 1
#define DFQSAM_CENTRE 0
#define DFQSAM_REGISTER "+x"
#include "product_tile.inl"

}  // namespace

const Kernels* avx_vnni() {
  static const Kernels kernels{"avx_vnni", kRows, kColumns, true, multiply, end};
  return __builtin_cpu_supports("avxvnni") ? &kernels : nullptr;
}

#else

const Kernels* avx_vnni() { return nullptr; }

#endif

}  // namespace dfqsam
