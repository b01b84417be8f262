// Both ends of attention: q, k, v cut into windows before it, tokens collected and quantized after it.
//
// SAM adds to each logit a score of the row offset and one of the column offset, both products of q with learned
// vectors. As 2 * side further columns of q, met by one-hot columns of k, the matrix product adds them itself, and
// attention needs no mask of queries times keys:
//
//   q'  [ q | root * q . table_h[row - r + side - 1], r = 0 ... | the same of columns | 0 ]
//   k'  [ k | 1 at r = own row                                  | 1 at own column     | 0 ]
//
// `root` undoes attention's scaling by 1 / sqrt(depth), which the scores are not subject to.
#include "rows.h"

namespace dfqsam {
namespace {

constexpr int kThreads = 128;

// Four halves that start at a multiple of four, as one 8-byte access.
struct alignas(8) Four {
  __half v[4];
};

inline __device__ Four load4(const __half* p) { return *reinterpret_cast<const Four*>(p); }

__device__ float dot(const __half* a, const __half* b, int depth) {
  float sum = 0.f;
  for (int i = 0; i < depth; i += 4) {
    const Four x = load4(a + i), y = load4(b + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += __half2float(x.v[j]) * __half2float(y.v[j]);
  }
  return sum;
}

__device__ __half relative_score(const AttentionInputs& p, const __half* q, int place, int column) {
  if (p.table_h == nullptr || column >= 2 * p.side) return __float2half(0.f);
  const bool rows = column < p.side;
  const int own = rows ? place / p.side : place % p.side;
  const int other = rows ? column : column - p.side;
  const __half* table = rows ? p.table_h : p.table_w;
  return __float2half(p.root * dot(q, table + (own - other + p.side - 1) * p.depth, p.depth));
}

__device__ __half own_place(const AttentionInputs& p, int place, int column) {
  if (p.table_h == nullptr) return __float2half(0.f);
  const bool one = column == place / p.side || column == p.side + place % p.side;
  return __float2half(one ? 1.f : 0.f);
}

// A block a query, or a key with its value: blockIdx.x counts queries, then keys; y windows, z images.
__global__ void attention_inputs_kernel(const AttentionInputs p) {
  const int keys = p.side * p.side;
  const int window = blockIdx.y;
  const bool is_query = static_cast<int>(blockIdx.x) < p.queries;
  const int item = is_query ? blockIdx.x : blockIdx.x - p.queries;
  const int count = is_query ? p.queries : keys;
  const int token = is_query ? p.query[window * p.queries + item] : p.key[window * keys + item];
  const int place = is_query ? p.place[window * p.queries + item] : item;
  const int channels = p.heads * p.depth;
  const __half* source =
      token >= 0 ? p.qkv + (static_cast<int64_t>(blockIdx.z) * p.tokens + token) * 3 * channels : p.padding;
  const int64_t out_window = static_cast<int64_t>(blockIdx.z) * p.windows + window;
  const int vectors = p.width / 4;
  for (int index = threadIdx.x; index < p.heads * vectors; index += kThreads) {
    const int head = index / vectors;
    const int first = index % vectors * 4;
    const int64_t to = ((out_window * p.heads + head) * count + item) * p.width + first;
    const int channel = head * p.depth + first;
    const bool inside = first < p.depth;  // depth % 4 == 0: all four or none
    Four a{}, b{};
    if (is_query) {
      // An empty slot of a window with fewer queries than its group's widest: zeros, and nobody reads its result.
      if (token >= 0) {
        if (inside) {
          a = load4(source + channel);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a.v[i] = relative_score(p, source + head * p.depth, place, first + i - p.depth);
        }
      }
      *reinterpret_cast<Four*>(p.q + to) = a;
    } else {
      if (inside) {
        a = load4(source + channels + channel);
        b = load4(source + 2 * channels + channel);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) a.v[i] = own_place(p, place, first + i - p.depth);
      }
      *reinterpret_cast<Four*>(p.k + to) = a;
      *reinterpret_cast<Four*>(p.v + to) = b;
    }
  }
}

template <bool kPacked>
__global__ void attention_output_kernel(
    AttentionGroup full, AttentionGroup partial, const int* slots, int64_t rows, int tokens, int heads,
    int depth, void* out, int padded, Quantizer quantizer) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int groups = padded / 8;
  if (index >= rows * groups) return;
  const int64_t row = index / groups;
  const int first = static_cast<int>(index % groups) * 8;
  const int64_t image = row / tokens;
  int slot = slots[row % tokens];
  const bool in_full = slot < full.windows * full.queries;
  if (!in_full) slot -= full.windows * full.queries;
  // Member by member: a choice between whole structures would put both into local memory.
  const int queries = in_full ? full.queries : partial.queries;
  const int64_t window = image * (in_full ? full.windows : partial.windows) + slot / queries;
  const int64_t head_stride = in_full ? full.head_stride : partial.head_stride;
  const __half* source = (in_full ? full.out : partial.out) +
                         window * (in_full ? full.window_stride : partial.window_stride) +
                         slot % queries * (in_full ? full.query_stride : partial.query_stride);
  int q[8];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    // Heads begin at multiples of four channels, not of eight.
    const int channel = first + 4 * part;
    if (channel < heads * depth) {
      const Four v = load4(source + channel / depth * head_stride + channel % depth);
#pragma unroll
      for (int i = 0; i < 4; ++i) q[4 * part + i] = quantizer(__half2float(v.v[i]));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[4 * part + i] = 0;
    }
  }
  store8<kPacked>(out, index, q);
}

bool multiple_of_four(const AttentionGroup& group) {
  return reinterpret_cast<uintptr_t>(group.out) % 8 == 0 && group.window_stride % 4 == 0 &&
         group.head_stride % 4 == 0 && group.query_stride % 4 == 0;
}

}  // namespace

cudaError_t attention_inputs(const AttentionInputs& p, cudaStream_t stream) {
  const bool fits = p.depth % 4 == 0 && p.width % 8 == 0 &&
                    p.width >= p.depth + (p.table_h == nullptr ? 0 : 2 * p.side) && p.windows <= 65535 &&
                    p.batch <= 65535;
  if (!fits) return cudaErrorInvalidValue;
  const dim3 grid(p.queries + p.side * p.side, p.windows, p.batch);
  attention_inputs_kernel<<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t attention_output(
    const AttentionGroup (&groups)[2], const int* slot, int batch, int tokens, int heads, int depth,
    const QuantizedRows& to, cudaStream_t stream) {
  if (depth % 4 != 0 || !multiple_of_four(groups[0]) || !multiple_of_four(groups[1]))
    return cudaErrorInvalidValue;
  const int64_t rows = static_cast<int64_t>(batch) * tokens;
  const auto blocks = static_cast<unsigned>((rows * (to.padded / 8) + kThreads - 1) / kThreads);
  const auto kernel = to.packed ? attention_output_kernel<true> : attention_output_kernel<false>;
  kernel<<<blocks, kThreads, 0, stream>>>(
      groups[0], groups[1], slot, rows, tokens, heads, depth, to.out, to.padded, to.quantizer);
  return cudaGetLastError();
}

}  // namespace dfqsam
