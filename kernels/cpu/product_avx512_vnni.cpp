// Four 8-bit products into each of 16 lanes at once: AVX-512 with VNNI.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "product_kernels.h"

namespace dfqsam {

#if defined(__AVX512VNNI__)

namespace {

using Vec = __m512i;
constexpr int kLanes = 16, kRows = 12, kVectors = 2;

inline Vec zero() { return _mm512_setzero_si512(); }
inline Vec load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Vec v) { _mm512_storeu_si512(p, v); }
inline Vec spread(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}
inline Vec dot4(Vec sums, Vec without_sign, Vec with_sign) { return _mm512_dpbusd_epi32(sums, without_sign, with_sign); }

#define DFQSAM_DOT 1
#define DFQSAM_CENTRE 0
#define DFQSAM_REGISTER "+v"
#include "product_tile.inl"

}  // namespace

const Kernels* avx512_vnni() {
  static const Kernels kernels{"avx512_vnni", kRows, kColumns, true, multiply, end};
  return __builtin_cpu_supports("avx512vnni") ? &kernels : nullptr;
}

#else

const Kernels* avx512_vnni() { return nullptr; }

#endif

}  // namespace dfqsam
