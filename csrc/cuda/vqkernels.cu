// The entry points of the CUDA library. Names say what is fixed at compile time:
//   {format}_b{batch}       product with exactly `batch` rows of activations
//   {format}_gemm{tile}     product with any number of rows, `tile` of them per block
//   {format}_dequantize     weights in half precision
// where {format} is vq_gptq{bits}, vq_codebook{V}x{stages}, vq_large{V}x{stages} or vq_trellis{bits}.
// All run 256 threads a block and may be captured in a CUDA graph: plain launches, no allocation.
#include "codebook.cuh"
#include "dequantize.cuh"
#include "gemm.cuh"
#include "gptq.cuh"
#include "trellis.cuh"

#if defined(VQ_CUDA_EMULATION)
#define VQ_SHARED unsigned char *shared = vq_emulation::dynamic_shared()
#else
#define VQ_SHARED extern __shared__ __align__(128) unsigned char shared[]
#endif

#define VQ_KERNEL extern "C" __global__ void __launch_bounds__(256)
// Two blocks per multiprocessor, so that one decodes while the other multiplies; but a trellis has
// a lane decode up to 32 outputs at once, which takes more registers.
#define VQ_SHARED_KERNEL extern "C" __global__ void __launch_bounds__(256, 2)
#define VQ_LONE_KERNEL extern "C" __global__ void __launch_bounds__(256, 1)
#define VQ_GPTQ_KERNEL VQ_SHARED_KERNEL
#define VQ_CODEBOOK_KERNEL VQ_SHARED_KERNEL
#define VQ_TRELLIS_KERNEL VQ_LONE_KERNEL

// What names the weights of a format in the arguments of its kernels, and the matrix made of it.
#define VQ_GPTQ_PARAMETERS                                                             \
  const unsigned *words, const __half *scales, const unsigned char *zeros, int inputs, \
      int outputs, int group_size
#define VQ_GPTQ_MATRIX                                \
  const vq::GptqMatrix matrix {                       \
    words, scales, zeros, inputs, outputs, group_size \
  }

#define VQ_CODEBOOK_PARAMETERS                                                              \
  const unsigned char *indices, const __half *entries, int inputs, int stride, int outputs, \
      int num_entries, int num_hot
#define VQ_CODEBOOK_MATRIX                                          \
  const vq::CodebookMatrix matrix {                                 \
    indices, entries, inputs, stride, outputs, num_entries, num_hot \
  }

#define VQ_TRELLIS_PARAMETERS                                                          \
  const unsigned *streams, const signed char *table, const __half *scales, int inputs, \
      int outputs, int stride, int group_size, unsigned multiplier, int trellis_bits
#define VQ_TRELLIS_MATRIX                                                                 \
  const vq::TrellisMatrix matrix {                                                        \
    streams, table, scales, inputs, outputs, stride, group_size, multiplier, trellis_bits \
  }

#define VQ_PRODUCT_PARAMETERS const __half *x, __half *y, float *partial, unsigned *counters

#define VQ_GPTQ(BITS, BATCH)                                                         \
  VQ_KERNEL vq_gptq##BITS##_b##BATCH(VQ_GPTQ_PARAMETERS, VQ_PRODUCT_PARAMETERS) {    \
    VQ_SHARED;                                                                       \
    VQ_GPTQ_MATRIX;                                                                  \
    vq::gptq_gemv<BITS, BATCH>(matrix, x, y, vq::Splits{partial, counters}, shared); \
  }

#define VQ_CODEBOOK(V, STAGES, BATCH)                                                     \
  VQ_KERNEL vq_codebook##V##x##STAGES##_b##BATCH(VQ_CODEBOOK_PARAMETERS, const __half *x, \
                                                 __half *y) {                             \
    VQ_SHARED;                                                                            \
    VQ_CODEBOOK_MATRIX;                                                                   \
    vq::codebook_gemv<V, STAGES, BATCH>(matrix, x, y, shared);                            \
  }

#define VQ_LARGE(V, STAGES, BATCH)                                                     \
  VQ_KERNEL vq_large##V##x##STAGES##_b##BATCH(VQ_CODEBOOK_PARAMETERS, const __half *x, \
                                              __half *y) {                             \
    VQ_SHARED;                                                                         \
    VQ_CODEBOOK_MATRIX;                                                                \
    vq::large_codebook_gemv<V, STAGES, BATCH>(matrix, x, y, shared);                   \
  }

#define VQ_TRELLIS(BITS, BATCH)                                                              \
  VQ_LONE_KERNEL vq_trellis##BITS##_b##BATCH(VQ_TRELLIS_PARAMETERS, VQ_PRODUCT_PARAMETERS) { \
    VQ_SHARED;                                                                               \
    VQ_TRELLIS_MATRIX;                                                                       \
    vq::trellis_gemv<BITS, BATCH>(matrix, x, y, vq::Splits{partial, counters}, shared);      \
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

VQ_LARGE(4, 1, 1)
VQ_LARGE(4, 1, 2)
VQ_LARGE(8, 1, 1)
VQ_LARGE(8, 1, 2)
VQ_LARGE(8, 2, 1)
VQ_LARGE(8, 2, 2)

VQ_TRELLIS(1, 1)
VQ_TRELLIS(2, 1)
VQ_TRELLIS(2, 2)
VQ_TRELLIS(3, 1)
VQ_TRELLIS(4, 1)
VQ_TRELLIS(4, 2)

// The kernels that work on decoded tiles. TILES is an expression of `matrix` and `output`, which
// moves `rest` behind the tables that it stages in shared memory.
#define VQ_GEMM(FORMAT, KIND, TILES, BATCH)                                                        \
  VQ_##KIND##_KERNEL vq_##FORMAT##_gemm##BATCH(VQ_##KIND##_PARAMETERS, VQ_PRODUCT_PARAMETERS,      \
                                               int rows, int row_stride) {                         \
    VQ_SHARED;                                                                                     \
    VQ_##KIND##_MATRIX;                                                                            \
    const int output = vq::block_output(outputs);                                                  \
    unsigned char *rest = shared;                                                                  \
    const auto tiles = TILES;                                                                      \
    vq::gemm<BATCH>(tiles, vq::Activations{x, rows, row_stride}, y, vq::Splits{partial, counters}, \
                    rest);                                                                         \
  }

#define VQ_DEQUANTIZE(FORMAT, KIND, TILES)                                               \
  VQ_##KIND##_KERNEL vq_##FORMAT##_dequantize(VQ_##KIND##_PARAMETERS, __half *weights) { \
    VQ_SHARED;                                                                           \
    VQ_##KIND##_MATRIX;                                                                  \
    const int output = vq::block_output(outputs);                                        \
    unsigned char *rest = shared;                                                        \
    const auto tiles = TILES;                                                            \
    vq::dequantize(tiles, weights, rest);                                                \
  }

#define VQ_TILED(FORMAT, KIND, TILES) \
  VQ_GEMM(FORMAT, KIND, TILES, 16)    \
  VQ_GEMM(FORMAT, KIND, TILES, 32)    \
  VQ_GEMM(FORMAT, KIND, TILES, 64)    \
  VQ_DEQUANTIZE(FORMAT, KIND, TILES)

#define VQ_GPTQ_TILED(BITS) VQ_TILED(gptq##BITS, GPTQ, (vq::GptqTiles<BITS>{matrix, output}))
#define VQ_CODEBOOK_TILED(V, STAGES) \
  VQ_TILED(codebook##V##x##STAGES, CODEBOOK, (vq::small_tiles<V, STAGES>(matrix, output, rest)))
#define VQ_LARGE_TILED(V, STAGES) \
  VQ_TILED(large##V##x##STAGES, CODEBOOK, (vq::large_tiles<V, STAGES>(matrix, output, rest)))
#define VQ_TRELLIS_TILED(BITS) \
  VQ_TILED(trellis##BITS, TRELLIS, (vq::trellis_tiles<BITS>(matrix, output, rest)))

VQ_GPTQ_TILED(2)
VQ_GPTQ_TILED(3)
VQ_GPTQ_TILED(4)
VQ_GPTQ_TILED(8)
VQ_CODEBOOK_TILED(4, 1)
VQ_CODEBOOK_TILED(8, 1)
VQ_CODEBOOK_TILED(8, 2)
VQ_LARGE_TILED(4, 1)
VQ_LARGE_TILED(8, 1)
VQ_LARGE_TILED(8, 2)
VQ_TRELLIS_TILED(1)
VQ_TRELLIS_TILED(2)
VQ_TRELLIS_TILED(3)
VQ_TRELLIS_TILED(4)
