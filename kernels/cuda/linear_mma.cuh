// The matrix product for families whose tensor cores are driven by mma.sync, from CUTLASS 2.x parts.
#pragma once

#include <cutlass/cutlass.h>
// The visitors' header lacks includes of its own: it comes last.
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>
#include <cutlass/gemm/threadblock/threadblock_swizzle.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "linear.h"

namespace dfqsam {

// The root of the epilogue: takes eight neighbouring accumulators of a row, dequantizes them, and ends in one
// of two ways: residual added and stored as fp16, or GELU, quantized and stored in the input's containers.
// Both share a kernel, because the branch is uniform and each kernel takes long to compile.
template <class ThreadMap, bool kPacked>
struct DequantizeStore {
  struct Arguments {
    Linear linear;
  };
  using Params = Arguments;
  struct SharedStorage {};

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }

  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }

  CUTLASS_HOST_DEVICE DequantizeStore() {}
  CUTLASS_HOST_DEVICE DequantizeStore(const Params& params, const SharedStorage&) : params(&params) {}

  const Params* params;

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::threadblock::detail::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(Coordinates&& coordinates, const Linear& linear)
        : coordinates(cute::forward<Coordinates>(coordinates)), linear(linear) {}

    Coordinates coordinates;  // (vector, column, row, step) -> (m, n, batch)
    const Linear& linear;

    template <class Accumulator, class Input, int kFragment>
    CUTLASS_DEVICE auto visit(
        int step, int row, int column, int, const cutlass::Array<Accumulator, kFragment>&,
        const cutlass::Array<Input, kFragment>& input) {
      static_assert(kFragment == 8, "stores eight values at once");
      const auto coordinate = coordinates(0, column, row, step);
      const int m = cute::get<0>(coordinate), n = cute::get<1>(coordinate);
      if (m >= linear.m || n >= linear.n) return input;  // n % 8 == 0: a vector is inside or outside
      float scale[8], y[8];
      load8(linear.scale + n, scale);
      load8(linear.bias + n, y);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 8; ++i) y[i] += static_cast<float>(input[i]) * scale[i];
      const int64_t offset = static_cast<int64_t>(m) * linear.n + n;
      if (linear.quantized != nullptr) {
        int q[8];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) q[i] = linear.quantizer(gelu(y[i]));
        store8<kPacked>(linear.quantized, offset / 8, q);
      } else {
        store_half(y, offset);
      }
      return input;
    }

    CUTLASS_DEVICE void store_half(float (&y)[8], int64_t offset) {
      if (linear.residual != nullptr) {
        float residual[8];
        load8(linear.residual + offset, residual);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) y[i] += residual[i];
      }
      uint4 raw;
      __half2* pairs = reinterpret_cast<__half2*>(&raw);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(y[2 * i], y[2 * i + 1]);
      *reinterpret_cast<uint4*>(linear.out + offset) = raw;
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(
      cutlass::gemm::GemmCoord tile, int thread, ProblemShape problem_shape) {
    auto all = cute::make_identity_tensor(problem_shape);
    auto mine = cute::group_modes<3, 6>(ThreadMap::partition(all, thread, tile));
    return Callbacks<decltype(mine)>(cute::move(mine), params->linear);
  }
};

// How one family multiplies one kind of values.
template <class Arch_, class X_, class Weight_, class Instruction_, int kAlignment_>
struct Arithmetic {
  using Arch = Arch_;
  using X = X_;
  using Weight = Weight_;
  using Instruction = Instruction_;
  static constexpr int kAlignment = kAlignment_;  // values in 16 bytes
  static constexpr bool kPacked = cutlass::sizeof_bits<X_>::value == 4;
};

template <class Arithmetic, class Tile, class Warp, int kStages>
struct Product {
  using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<Tile, Warp, cutlass::half_t, 8, 1>;
  using Callbacks = cutlass::epilogue::threadblock::Sm80EVT<
      DequantizeStore<ThreadMap, Arithmetic::kPacked>, cutlass::epilogue::threadblock::VisitorAccFetch>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      typename Arithmetic::X, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone,
      Arithmetic::kAlignment, typename Arithmetic::Weight, cutlass::layout::ColumnMajor,
      cutlass::ComplexTransform::kNone, Arithmetic::kAlignment, cutlass::half_t, cutlass::layout::RowMajor, 8,
      int32_t, float, cutlass::arch::OpClassTensorOp, typename Arithmetic::Arch, Tile, Warp,
      typename Arithmetic::Instruction, Callbacks, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>,
      kStages, cutlass::arch::OpMultiplyAddSaturate, 1>::GemmKernel;
};

// Kernels of our own name around CUTLASS's body, so that machine code and profiles say which is which.
template <class Kernel>
__global__ __launch_bounds__(Kernel::kThreadCount) void linear_u4s4_native_kernel(
    const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(16) unsigned char shared[];
  Kernel::invoke(params, *reinterpret_cast<typename Kernel::SharedStorage*>(shared));
}

template <class Kernel>
__global__ __launch_bounds__(Kernel::kThreadCount) void linear_u8s8_kernel(
    const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(16) unsigned char shared[];
  Kernel::invoke(params, *reinterpret_cast<typename Kernel::SharedStorage*>(shared));
}

template <class Kernel, bool kPacked>
cudaError_t launch(const Linear& linear) {
  typename Kernel::Arguments arguments(
      cutlass::gemm::GemmUniversalMode::kGemm, {linear.m, linear.n, linear.k}, 1, {{}, {linear}}, linear.x,
      linear.weight, nullptr, nullptr, 0, 0, 0, 0, static_cast<int64_t>(linear.k),
      static_cast<int64_t>(linear.k), static_cast<int64_t>(linear.n), static_cast<int64_t>(linear.n));
  typename Kernel::Params params(arguments, linear.multiprocessors, 1);
  void (*kernel)(typename Kernel::Params);
  if constexpr (kPacked) {
    kernel = linear_u4s4_native_kernel<Kernel>;
  } else {
    kernel = linear_u8s8_kernel<Kernel>;
  }
  constexpr int kShared = sizeof(typename Kernel::SharedStorage);
  if constexpr (kShared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<params.get_grid_dims(), Kernel::kThreadCount, kShared, linear.stream>>>(params);
  return cudaGetLastError();
}

// Large tiles where they fill the device, small ones where large ones would leave most of it idle.
template <class Arithmetic, int kTileK, int kStagesLarge, int kStagesSmall>
cudaError_t run(const Linear& linear) {
  using cutlass::gemm::GemmShape;
  using Large = Product<Arithmetic, GemmShape<128, 128, kTileK>, GemmShape<64, 64, kTileK>, kStagesLarge>;
  using Small = Product<Arithmetic, GemmShape<64, 64, kTileK>, GemmShape<32, 32, kTileK>, kStagesSmall>;
  const int64_t large_tiles = static_cast<int64_t>((linear.m + 127) / 128) * ((linear.n + 127) / 128);
  return large_tiles >= linear.multiprocessors ? launch<typename Large::Kernel, Arithmetic::kPacked>(linear)
                                               : launch<typename Small::Kernel, Arithmetic::kPacked>(linear);
}

}  // namespace dfqsam
