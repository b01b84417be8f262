// Ampere and Ada (sm_80, sm_86, sm_89): native 4-bit MMA m16n8k64 and int8 MMA m16n8k32.
//
// Later architectures would compile this too, into a software routine for 4 bit; hence the guard.
#if defined(__CUDA_ARCH__) && !(__CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900)
#error "linear_sm80.cu is for sm_80 to sm_89; other architectures have files of their own"
#endif

#include "linear_mma.cuh"

namespace dfqsam::sm80 {

using cutlass::gemm::GemmShape;
using U4S4 = Arithmetic<cutlass::arch::Sm80, cutlass::uint4b_t, cutlass::int4b_t, GemmShape<16, 8, 64>, 32>;
using U8S8 = Arithmetic<cutlass::arch::Sm80, uint8_t, int8_t, GemmShape<16, 8, 32>, 16>;

cudaError_t linear_u4s4_native(const Linear& linear) { return run<U4S4, 128, 4, 6>(linear); }
cudaError_t linear_u8s8(const Linear& linear) { return run<U8S8, 64, 4, 6>(linear); }

}  // namespace dfqsam::sm80
