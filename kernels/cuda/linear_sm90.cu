// Hopper: no 4-bit MMA; int8 warpgroup MMA (wgmma) on 8-bit containers, fed by TMA, from CUTLASS 3.x parts.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "linear_sm90.cu is for sm_90a alone: wgmma does not exist elsewhere, sm_90 without the 'a' included"
#endif

#include <cutlass/cutlass.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "linear.h"

namespace dfqsam::sm90 {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// quantize(gelu(y)) on fragments; the visitor converts the integers, held as floats, to uint8.
template <class Fragment>
struct GeluQuantize {
  using Arguments = Quantizer;
  CUTLASS_DEVICE Fragment operator()(const Fragment& y, const Quantizer& quantizer) const {
    Fragment q;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) q[i] = static_cast<float>(quantizer(gelu(y[i])));
    return q;
  }
};

template <class Tile>
using Row = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>>;

// accumulator * scale[n] + bias[n]
template <class Tile>
using Dequantize = fusion::Sm90EVT<
    fusion::Sm90Compute<cutlass::homogeneous_multiply_add, float, float, kRound>, fusion::Sm90AccFetch,
    Row<Tile>, Row<Tile>>;

// beta * residual + that, beta 1 or 0; with 0 the residual is not read.
template <class Tile>
using ToHalf = fusion::Sm90EVT<
    fusion::Sm90Compute<cutlass::homogeneous_multiply_add, cutlass::half_t, float, kRound>,
    fusion::Sm90ScalarBroadcast<float>, fusion::Sm90SrcFetch<cutlass::half_t>, Dequantize<Tile>>;

template <class Tile>
using ToQuantized =
    fusion::Sm90EVT<fusion::Sm90Compute<GeluQuantize, uint8_t, float, kRound>, Dequantize<Tile>>;

template <class Tile, class Mainloop, class Epilogue, bool kQuantized>
struct Product {
  using Source = std::conditional_t<kQuantized, void, cutlass::half_t>;
  using Output = std::conditional_t<kQuantized, uint8_t, cutlass::half_t>;
  using Fusion = std::conditional_t<kQuantized, ToQuantized<Tile>, ToHalf<Tile>>;
  static constexpr int kOutputAlignment = 128 / cutlass::sizeof_bits<Output>::value;
  using RowMajor = cutlass::layout::RowMajor;
  using Cluster = Shape<_1, _1, _1>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, Source, RowMajor, kOutputAlignment,
      Output, RowMajor, kOutputAlignment, Epilogue, Fusion>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, uint8_t, RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<
          static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;
};

template <class Product, bool kQuantized>
cudaError_t launch(const Linear& linear) {
  using Kernel = typename Product::Kernel;
  const auto stride_x = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {linear.m, linear.k, 1});
  const auto stride_w = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {linear.n, linear.k, 1});
  const auto stride_y = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {linear.m, linear.n, 1});
  typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {linear.m, linear.n, linear.k, 1},
      {static_cast<const uint8_t*>(linear.x), stride_x, static_cast<const int8_t*>(linear.weight), stride_w},
      {}};
  auto& epilogue = arguments.epilogue;
  epilogue.dD = stride_y;
  if constexpr (kQuantized) {
    epilogue.ptr_D = static_cast<uint8_t*>(linear.quantized);
    epilogue.thread = {{{}, {linear.scale}, {linear.bias}, {}}, linear.quantizer};
  } else {
    epilogue.ptr_D = reinterpret_cast<cutlass::half_t*>(linear.out);
    // A descriptor is made of ptr_C even where beta is 0 and nothing is read, so that it must not be null.
    epilogue.ptr_C = linear.residual == nullptr ? epilogue.ptr_D
                                                : reinterpret_cast<const cutlass::half_t*>(linear.residual);
    epilogue.dC = stride_y;
    epilogue.thread = {
        {{linear.residual == nullptr ? 0.f : 1.f}}, {}, {{}, {linear.scale}, {linear.bias}, {}}, {}};
  }
  arguments.hw_info.sm_count = linear.multiprocessors;
  cutlass::gemm::device::GemmUniversalAdapter<Kernel> product;
  if (product.can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  if (Kernel::get_workspace_size(arguments) != 0) return cudaErrorNotSupported;
  if (product.initialize(arguments, nullptr, linear.stream) != cutlass::Status::kSuccess ||
      product.run(linear.stream) != cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaErrorUnknown : error;
  }
  return cudaGetLastError();
}

template <bool kQuantized>
cudaError_t run(const Linear& linear) {
  using Large = Product<
      Shape<_128, _128, _128>, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
      cutlass::epilogue::TmaWarpSpecializedCooperative, kQuantized>;
  using Small = Product<
      Shape<_64, _64, _128>, cutlass::gemm::KernelTmaWarpSpecialized, cutlass::epilogue::TmaWarpSpecialized,
      kQuantized>;
  const int64_t large_tiles = static_cast<int64_t>((linear.m + 127) / 128) * ((linear.n + 127) / 128);
  return large_tiles >= linear.multiprocessors ? launch<Large, kQuantized>(linear)
                                               : launch<Small, kQuantized>(linear);
}

cudaError_t linear_u8s8(const Linear& linear) {
  return linear.quantized != nullptr ? run<true>(linear) : run<false>(linear);
}

}  // namespace dfqsam::sm90
