// Four 8-bit products into each of 4 lanes at once: ARM's dot product, which is of two signed factors. Rows are
// therefore taken less 128.
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <utility>

#include "product_kernels.h"

namespace dfqsam {

#if defined(__ARM_FEATURE_DOTPROD)

namespace {

using Vec = int32x4_t;
constexpr int kLanes = 4, kRows = 6, kVectors = 4;  // 24 sums, 4 weights and a row, of 32 registers

inline Vec zero() { return vdupq_n_s32(0); }
inline Vec load(const void* p) { return vld1q_s32(static_cast<const int32_t*>(p)); }
inline void store(void* p, Vec v) { vst1q_s32(static_cast<int32_t*>(p), v); }
inline Vec spread(const void* p) {
  return veorq_s32(vld1q_dup_s32(static_cast<const int32_t*>(p)), vdupq_n_s32(static_cast<int32_t>(0x80808080u)));
}
inline Vec dot4(Vec sums, Vec rows, Vec weights) {
  return vdotq_s32(sums, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(rows));
}

#define DFQSAM_DOT 1
#define DFQSAM_CENTRE 128
#define DFQSAM_REGISTER "+w"
#include "product_tile.inl"

bool supported() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // all of Apple's
#endif
}

}  // namespace

const Kernels* neon_dot() {
  static const Kernels kernels{"neon_dot", kRows, kColumns, true, multiply, end};
  return supported() ? &kernels : nullptr;
}

#else

const Kernels* neon_dot() { return nullptr; }

#endif

}  // namespace dfqsam
