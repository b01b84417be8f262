// Blackwell (sm_100, sm_120): no 4-bit MMA; int8 MMA m16n8k32 by mma.sync.
//
// The tensor cores of sm_100 reach their full rate only by tcgen05, which this does not use.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
#error "linear_sm100.cu is for sm_100 and later; other architectures have files of their own"
#endif

#include "linear_mma.cuh"

namespace dfqsam::sm100 {

using cutlass::gemm::GemmShape;
using U8S8 = Arithmetic<cutlass::arch::Sm80, uint8_t, int8_t, GemmShape<16, 8, 32>, 16>;

cudaError_t linear_u8s8(const Linear& linear) { return run<U8S8, 64, 4, 6>(linear); }

}  // namespace dfqsam::sm100
