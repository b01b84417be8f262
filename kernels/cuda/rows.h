// The kernels between matrix products: rows of floats in, quantized rows out, and attention's two ends.
#pragma once

#include "layout.cuh"

namespace dfqsam {

// Where quantized rows go: [rows, padded], columns from the input's width on are 0.
struct QuantizedRows {
  void* out;     // 16-byte aligned
  int padded;    // multiple of kRowMultiple
  bool packed;   // two values a byte, or one
  Quantizer quantizer;
};

// x [rows, columns], rows `stride` elements apart; float where `half` is false.
cudaError_t quantize_rows(
    const void* x, bool half, int64_t rows, int columns, int64_t stride, const QuantizedRows&, cudaStream_t);

// x [rows, channels] contiguous, channels % 8 == 0 and at most 2048; weight, bias [channels].
cudaError_t layer_norm_quantize(
    const void* x, bool half, const float* weight, const float* bias, float epsilon, int64_t rows,
    int channels, const QuantizedRows&, cudaStream_t);

// packed [bytes], signed 4 bit, to out [2 * bytes].
cudaError_t unpack_signed(const uint8_t* packed, int8_t* out, int64_t bytes, cudaStream_t);

// q, k, v of windows, with relative position as further columns; ops/cuda.py draws it.
struct AttentionInputs {
  const __half* qkv;       // [batch * tokens, 3 * heads * depth]
  const __half* padding;   // [3 * heads * depth], q, k, v of a token outside the image, or null
  const __half* table_h;   // [2 * side - 1, depth], or null
  const __half* table_w;   // likewise
  const int* query;        // [windows, queries] token, or -1
  const int* place;        // [windows, queries] row * side + column within the window
  const int* key;          // [windows, side * side] token, or -1 for padding
  __half *q, *k, *v;       // [batch * windows, heads, queries or side * side, width]
  int batch, tokens, windows, queries, side, heads, depth, width;  // depth % 4 == 0, width % 8 == 0
  float root;              // sqrt(depth)
};
cudaError_t attention_inputs(const AttentionInputs&, cudaStream_t);

// Attention's results of one group of windows: element (window, head, query, d).
struct AttentionGroup {
  const __half* out;
  int64_t window_stride, head_stride, query_stride;  // of elements; d is contiguous
  int windows, queries;                              // of one image
};
// slot [tokens]: window * queries + query within group 0, or that plus group 0's slots within group 1.
cudaError_t attention_output(
    const AttentionGroup (&groups)[2], const int* slot, int batch, int tokens, int heads, int depth,
    const QuantizedRows&, cudaStream_t);

}  // namespace dfqsam
