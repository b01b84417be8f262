// The C interface of libdfqsam_cuda.so. Every function works on the device that the calling thread chose by
// dfqsam_set_device, enqueues on the given stream of it, allocates nothing and waits for nothing, so that all of
// them can be captured in a CUDA graph.
//
// They return 0, a positive cudaError_t, or one of the negative codes below; dfqsam_message says it in words.
#include "linear.h"
#include "rows.h"

namespace {

enum Refusal { kNoKernel = -1, kBadShape = -2, kMisaligned = -3 };

// Major * 10 + minor, as in sm_86.
cudaError_t architecture(int device, int* value) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *value = major * 10 + minor;
  return error;
}

using Implementation = cudaError_t (*)(const dfqsam::Linear&);

// The only implementations are those compiled for an architecture; no family falls back to another's.
Implementation implementation(int architecture, bool packed) {
  using namespace dfqsam;
  if (architecture == 75) return packed ? sm75::linear_u4s4_native : sm75::linear_u8s8;
  if (architecture == 80 || architecture == 86 || architecture == 89)
    return packed ? sm80::linear_u4s4_native : sm80::linear_u8s8;
  if (packed) return nullptr;
  if (architecture == 90) return sm90::linear_u8s8;
  if (architecture == 100 || architecture == 120) return sm100::linear_u8s8;
  return nullptr;
}

bool misaligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 != 0; }

int run_linear(dfqsam::Linear linear, bool packed) {
  const bool fits = linear.m > 0 && linear.n > 0 && linear.k > 0 && linear.n % 8 == 0 &&
                    linear.k % dfqsam::kRowMultiple == 0 &&
                    (linear.quantized == nullptr || linear.n % dfqsam::kRowMultiple == 0);
  if (!fits) return kBadShape;
  for (const void* pointer :
       {linear.x, linear.weight, static_cast<const void*>(linear.scale),
        static_cast<const void*>(linear.bias), static_cast<const void*>(linear.residual),
        static_cast<const void*>(linear.out), static_cast<const void*>(linear.quantized)})
    if (misaligned(pointer)) return kMisaligned;
  int device = 0, arch = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = architecture(device, &arch);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&linear.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const Implementation run = implementation(arch, packed);
  if (run == nullptr) return kNoKernel;
  return run(linear);
}

dfqsam::Quantizer quantizer(float inverse_scale, int zero_point, int bits) {
  return {inverse_scale, static_cast<float>(zero_point), static_cast<float>((1 << bits) - 1)};
}

int check_rows(const dfqsam::QuantizedRows& to, int64_t columns) {
  if (to.padded % dfqsam::kRowMultiple != 0 || to.padded < columns) return kBadShape;
  if (to.packed && to.quantizer.top > 15.f) return kBadShape;
  return misaligned(to.out) ? kMisaligned : 0;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* dfqsam_message(int status) {
  switch (status) {
    case kNoKernel: return "this library holds no kernel of this kind for the GPU";
    case kBadShape: return "sizes that the kernels do not take";
    case kMisaligned: return "a pointer that is not aligned to 16 bytes";
    default: return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}

// Whether a device multiplies 4-bit values itself (1), in 8-bit containers (0), or not at all (-1).
int dfqsam_native_4bit(int device) {
  int arch = 0;
  if (architecture(device, &arch) != cudaSuccess) return kNoKernel;
  if (implementation(arch, true) != nullptr) return 1;
  return implementation(arch, false) != nullptr ? 0 : kNoKernel;
}

// The library has a CUDA runtime of its own, which need not know what the caller's has chosen.
int dfqsam_set_device(int device) { return cudaSetDevice(device); }

int dfqsam_linear(
    const void* x, const void* weight, const float* scale, const float* bias, const void* residual, void* out,
    int m, int n, int k, int packed, void* stream) {
  return run_linear(
      {x, weight, scale, bias, static_cast<const __half*>(residual), static_cast<__half*>(out), nullptr, {},
       m, n, k, 0, static_cast<cudaStream_t>(stream)},
      packed);
}

int dfqsam_linear_gelu_quantize(
    const void* x, const void* weight, const float* scale, const float* bias, float inverse_scale,
    int zero_point, int bits, void* out, int m, int n, int k, int packed, void* stream) {
  if (packed && bits > 4) return kBadShape;
  return run_linear(
      {x, weight, scale, bias, nullptr, nullptr, out, quantizer(inverse_scale, zero_point, bits), m, n, k, 0,
       static_cast<cudaStream_t>(stream)},
      packed);
}

int dfqsam_quantize_rows(
    const void* x, int half, int64_t rows, int columns, int64_t stride, float inverse_scale, int zero_point,
    int bits, int padded, int packed, void* out, void* stream) {
  const dfqsam::QuantizedRows to{out, padded, packed != 0, quantizer(inverse_scale, zero_point, bits)};
  if (const int refusal = check_rows(to, columns)) return refusal;
  return dfqsam::quantize_rows(x, half, rows, columns, stride, to, static_cast<cudaStream_t>(stream));
}

int dfqsam_layer_norm_quantize(
    const void* x, int half, const float* weight, const float* bias, float epsilon, int64_t rows, int channels,
    float inverse_scale, int zero_point, int bits, int padded, int packed, void* out, void* stream) {
  const dfqsam::QuantizedRows to{out, padded, packed != 0, quantizer(inverse_scale, zero_point, bits)};
  if (const int refusal = check_rows(to, channels)) return refusal;
  if (misaligned(x) || misaligned(weight) || misaligned(bias)) return kMisaligned;
  return dfqsam::layer_norm_quantize(
      x, half, weight, bias, epsilon, rows, channels, to, static_cast<cudaStream_t>(stream));
}

int dfqsam_unpack_signed(const void* packed, void* out, int64_t bytes, void* stream) {
  return dfqsam::unpack_signed(
      static_cast<const uint8_t*>(packed), static_cast<int8_t*>(out), bytes,
      static_cast<cudaStream_t>(stream));
}

int dfqsam_attention_inputs(
    const void* qkv, const void* padding, const void* table_h, const void* table_w, const int* query,
    const int* place, const int* key, void* q, void* k, void* v, int batch, int tokens, int windows,
    int queries, int side, int heads, int depth, int width, float root, void* stream) {
  for (const void* pointer : {qkv, padding, table_h, table_w, static_cast<const void*>(q),
                              static_cast<const void*>(k), static_cast<const void*>(v)})
    if (misaligned(pointer)) return kMisaligned;
  const dfqsam::AttentionInputs inputs{
      static_cast<const __half*>(qkv),
      static_cast<const __half*>(padding),
      static_cast<const __half*>(table_h),
      static_cast<const __half*>(table_w),
      query,
      place,
      key,
      static_cast<__half*>(q),
      static_cast<__half*>(k),
      static_cast<__half*>(v),
      batch,
      tokens,
      windows,
      queries,
      side,
      heads,
      depth,
      width,
      root};
  return dfqsam::attention_inputs(inputs, static_cast<cudaStream_t>(stream));
}

// strides [6]: window, head and query of group 0, then of group 1; sizes [4]: windows and queries likewise.
int dfqsam_attention_output(
    const void* full, const void* partial, const int64_t* strides, const int* sizes, const int* slot,
    int batch, int tokens, int heads, int depth, float inverse_scale, int zero_point, int bits, int padded,
    int packed, void* out, void* stream) {
  const dfqsam::QuantizedRows to{out, padded, packed != 0, quantizer(inverse_scale, zero_point, bits)};
  if (const int refusal = check_rows(to, heads * depth)) return refusal;
  const dfqsam::AttentionGroup groups[2] = {
      {static_cast<const __half*>(full), strides[0], strides[1], strides[2], sizes[0], sizes[1]},
      {static_cast<const __half*>(partial), strides[3], strides[4], strides[5], sizes[2], sizes[3]}};
  return dfqsam::attention_output(
      groups, slot, batch, tokens, heads, depth, to, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
#pragma GCC visibility pop
