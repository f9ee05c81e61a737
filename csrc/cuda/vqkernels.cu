// The entry points of the CUDA library. Names say what is fixed at compile time:
//   vq_gptq{bits}_b{batch}            vq_trellis{bits}_b{batch}
//   vq_codebook{V}x{stages}_b{batch}  vq_large{V}_b{batch}
//   vq_gptq{bits}_dequantize          vq_trellis{bits}_dequantize
//   vq_codebook_dequantize            vq_large_dequantize
// All run 256 threads a block and may be captured in a CUDA graph: plain launches, no allocation.
#include "codebook.cuh"
#include "dequantize.cuh"
#include "gptq.cuh"
#include "trellis.cuh"

#if defined(VQ_CUDA_EMULATION)
#define VQ_SHARED unsigned char *shared = vq_emulation::dynamic_shared()
#else
#define VQ_SHARED extern __shared__ __align__(128) unsigned char shared[]
#endif

#define VQ_GPTQ(BITS, BATCH)                                                                       \
  extern "C" __global__ void __launch_bounds__(256) vq_gptq##BITS##_b##BATCH(                      \
      const unsigned *words, const __half *scales, const unsigned char *zeros, const __half *x,    \
      __half *y, float *partial, unsigned *counters, int inputs, int outputs, int group_size) {    \
    VQ_SHARED;                                                                                     \
    const vq::GptqMatrix matrix{words, scales, zeros, inputs, outputs, group_size};                \
    vq::gptq_gemv<BITS, BATCH>(matrix, x, y, vq::Splits{partial, counters}, shared);               \
  }

#define VQ_CODEBOOK(V, STAGES, BATCH)                                                              \
  extern "C" __global__ void __launch_bounds__(256) vq_codebook##V##x##STAGES##_b##BATCH(          \
      const unsigned char *indices, const __half *entries, const __half *x, __half *y, int inputs, \
      int stride, int outputs, int num_entries) {                                                  \
    VQ_SHARED;                                                                                     \
    const vq::CodebookMatrix matrix{indices, entries, inputs, stride, outputs, num_entries, 0};    \
    vq::codebook_gemv<V, STAGES, BATCH>(matrix, x, y, shared);                                     \
  }

#define VQ_LARGE(V, BATCH)                                                                         \
  extern "C" __global__ void __launch_bounds__(256) vq_large##V##_b##BATCH(                        \
      const unsigned char *indices, const __half *entries, const __half *x, __half *y, int inputs, \
      int stride, int outputs, int num_entries, int num_hot) {                                     \
    VQ_SHARED;                                                                                     \
    const vq::CodebookMatrix matrix{indices, entries, inputs, stride,                              \
                                    outputs, num_entries, num_hot};                                \
    vq::large_codebook_gemv<V, BATCH>(matrix, x, y, shared);                                       \
  }

#define VQ_TRELLIS(BITS, BATCH)                                                                    \
  extern "C" __global__ void __launch_bounds__(256) vq_trellis##BITS##_b##BATCH(                   \
      const unsigned *streams, const signed char *table, const __half *scales, const __half *x,    \
      __half *y, float *partial, unsigned *counters, int inputs, int outputs, int stride,          \
      int group_size, unsigned multiplier, int trellis_bits) {                                     \
    VQ_SHARED;                                                                                     \
    const vq::TrellisMatrix matrix{streams, table,      scales,     inputs,      outputs,          \
                                   stride,  group_size, multiplier, trellis_bits};                 \
    vq::trellis_gemv<BITS, BATCH>(matrix, x, y, vq::Splits{partial, counters}, shared);            \
  }

VQ_GPTQ(2, 1)
VQ_GPTQ(2, 2)
VQ_GPTQ(2, 4)
VQ_GPTQ(3, 1)
VQ_GPTQ(3, 2)
VQ_GPTQ(3, 4)
VQ_GPTQ(4, 1)
VQ_GPTQ(4, 2)
VQ_GPTQ(4, 4)
VQ_GPTQ(8, 1)
VQ_GPTQ(8, 2)
VQ_GPTQ(8, 4)

VQ_CODEBOOK(4, 1, 1)
VQ_CODEBOOK(4, 1, 2)
VQ_CODEBOOK(4, 1, 4)
VQ_CODEBOOK(8, 1, 1)
VQ_CODEBOOK(8, 1, 2)
VQ_CODEBOOK(8, 1, 4)
VQ_CODEBOOK(8, 2, 1)
VQ_CODEBOOK(8, 2, 2)
VQ_CODEBOOK(8, 2, 4)

VQ_LARGE(4, 1)
VQ_LARGE(4, 2)
VQ_LARGE(8, 1)
VQ_LARGE(8, 2)

VQ_TRELLIS(1, 1)
VQ_TRELLIS(2, 1)
VQ_TRELLIS(2, 2)
VQ_TRELLIS(3, 1)
VQ_TRELLIS(4, 1)
VQ_TRELLIS(4, 2)

#define VQ_GPTQ_DEQUANTIZE(BITS)                                                                   \
  extern "C" __global__ void __launch_bounds__(256) vq_gptq##BITS##_dequantize(                    \
      const unsigned *words, const __half *scales, const unsigned char *zeros, __half *weights,    \
      int inputs, int outputs, int group_size) {                                                   \
    const vq::GptqMatrix matrix{words, scales, zeros, inputs, outputs, group_size};                \
    vq::gptq_dequantize<BITS>(matrix, weights);                                                    \
  }

#define VQ_CODEBOOK_DEQUANTIZE(NAME, LARGE)                                                        \
  extern "C" __global__ void __launch_bounds__(256) vq_##NAME##_dequantize(                        \
      const unsigned char *indices, const __half *entries, __half *weights, int inputs,            \
      int stride, int outputs, int num_entries, int v, int stages) {                               \
    const vq::CodebookMatrix matrix{indices, entries, inputs, stride, outputs, num_entries, 0};    \
    vq::codebook_dequantize<LARGE>(matrix, v, stages, weights);                                    \
  }

#define VQ_TRELLIS_DEQUANTIZE(BITS)                                                                \
  extern "C" __global__ void __launch_bounds__(256) vq_trellis##BITS##_dequantize(                 \
      const unsigned *streams, const signed char *table, const __half *scales, __half *weights,    \
      int inputs, int outputs, int stride, int group_size, unsigned multiplier,                    \
      int trellis_bits) {                                                                          \
    const vq::TrellisMatrix matrix{streams, table,      scales,     inputs,      outputs,          \
                                   stride,  group_size, multiplier, trellis_bits};                 \
    vq::trellis_dequantize<BITS>(matrix, weights);                                                 \
  }

VQ_GPTQ_DEQUANTIZE(2)
VQ_GPTQ_DEQUANTIZE(3)
VQ_GPTQ_DEQUANTIZE(4)
VQ_GPTQ_DEQUANTIZE(8)
VQ_CODEBOOK_DEQUANTIZE(codebook, false)
VQ_CODEBOOK_DEQUANTIZE(large, true)
VQ_TRELLIS_DEQUANTIZE(1)
VQ_TRELLIS_DEQUANTIZE(2)
VQ_TRELLIS_DEQUANTIZE(3)
VQ_TRELLIS_DEQUANTIZE(4)
