// Turing: native 4-bit MMA m8n8k32 and int8 MMA m8n8k16.
//
// arch::Sm75 is not a preference: the Sm80 template compiles for sm_75 to code without any MMA.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 750
#error "linear_sm75.cu is for sm_75 alone; other architectures have files of their own"
#endif

#include "linear_mma.cuh"

namespace dfqsam::sm75 {

using cutlass::gemm::GemmShape;
using U4S4 = Arithmetic<cutlass::arch::Sm75, cutlass::uint4b_t, cutlass::int4b_t, GemmShape<8, 8, 32>, 32>;
using U8S8 = Arithmetic<cutlass::arch::Sm75, uint8_t, int8_t, GemmShape<8, 8, 16>, 16>;

cudaError_t linear_u4s4_native(const Linear& linear) { return run<U4S4, 128, 2, 2>(linear); }
cudaError_t linear_u8s8(const Linear& linear) { return run<U8S8, 64, 2, 2>(linear); }

}  // namespace dfqsam::sm75
