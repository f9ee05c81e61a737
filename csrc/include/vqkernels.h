/* C ABI of the vqstack CPU kernels (libvqkernels_cpu).
 *
 * Plain C, no Python, no torch, no environment variables. The caller owns all memory; functions
 * never keep a pointer after they return. Every function that can fail returns a vq_status and
 * writes nothing useful to its outputs unless that status is VQ_OK.
 *
 * Names: a linear layer maps in_features inputs to out_features outputs. Input columns are cut into
 * groups of group_size that share one scale and one zero point per output; the last group may be
 * shorter (576 = 4 * 128 + 64).
 */
#ifndef VQKERNELS_H
#define VQKERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define VQ_API __declspec(dllexport)
#else
#define VQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one whenever a struct, a layout or the meaning of an argument changes. */
#define VQ_ABI_VERSION 4

enum {
  VQ_MAX_FEATURES = 1 << 24, /* bound on in_features, out_features and batch */
  VQ_MAX_THREADS = 256,
  VQ_LATTICE_MAX_CODES = 65536,
  VQ_LATTICE_MAX_FEATURES = 65536,
  VQ_LATTICE_MAX_SUPPORT = 4,
  VQ_LATTICE_MAX_DENOMINATOR = 16,
  VQ_LATTICE_MAX_STATES = 256 /* bound on count and beam */
};

typedef enum vq_status {
  VQ_OK = 0,
  VQ_ERR_NULL = 1,      /* a required pointer is NULL */
  VQ_ERR_SHAPE = 2,     /* a size is out of range or one that the kernels do not take */
  VQ_ERR_ISA = 3,       /* unknown tier, or one this CPU or this build cannot run */
  VQ_ERR_NONFINITE = 4, /* an activation is NaN or infinite */
  VQ_ERR_MEMORY = 5,    /* allocation or thread creation failed */
  VQ_ERR_FORKED = 6     /* the pool was created before a fork; its threads are gone */
} vq_status;

/* Instruction-set tiers, slowest first. All tiers give bit-identical results. */
typedef enum vq_isa {
  VQ_ISA_AUTO = -1, /* only for vq_set_isa: the best tier that runs here */
  VQ_ISA_BASELINE = 0,
  VQ_ISA_AVX2 = 1,
  VQ_ISA_AVX512_VNNI = 2,
  VQ_ISA_AVX512_VBMI = 3 /* the same with byte permutes */
} vq_isa;

/* A persistent thread pool. The calling thread is its first worker. */
typedef struct vq_pool vq_pool;

/* The VQ_ABI_VERSION the library was built with. */
VQ_API int32_t vq_abi_version(void);

/* One English sentence for a vq_status; never NULL. */
VQ_API const char *vq_status_text(int32_t status);

/* "baseline", "avx2", "avx512_vnni", "avx512_vbmi" or "unknown"; never NULL. */
VQ_API const char *vq_isa_name(int32_t isa);

/* 1 if this build contains the tier and CPU and operating system can run it, else 0. */
VQ_API int32_t vq_isa_supported(int32_t isa);

/* The tier that the next call will use. */
VQ_API int32_t vq_get_isa(void);

/* Force a tier for the whole process, or VQ_ISA_AUTO. VQ_ERR_ISA leaves the tier as it was. */
VQ_API int32_t vq_set_isa(int32_t isa);

/* Start num_threads - 1 worker threads (1 <= num_threads <= VQ_MAX_THREADS). Free with
 * vq_pool_free. */
VQ_API int32_t vq_pool_create(int32_t num_threads, vq_pool **pool);

/* Join the workers. NULL is allowed. No call may be running on the pool. */
VQ_API void vq_pool_free(vq_pool *pool);

/* ---- Packed matrices of every format ----
 *
 * A vq_matrix multiplies activations [batch][in_features] with weights [out_features][in_features].
 * It may stack parts of different formats (q, k, v; gate, up): their rows follow each other.
 * Activations become int8 with one scale per 128 columns:
 *   amax = max |x| over the columns; scale = amax / 127; q = round_half_even(x * (127 / amax))
 * all in binary32; amax < 1e-30 becomes q = 0, scale = 0. On Gaussian rows the relative RMS error
 * is about 6e-3. Dots within the smaller of a weight group and 128 columns are exact int32; then
 *   y[n] = sum over stages of (sum over groups, in order, of float(dot) * (w_scale * x_scale))
 * with a rounding after every operation, so that tiers, batches and threads give the same bits. */

enum {
  VQ_MATRIX_GRID = 0,  /* (code - zero) * scale, 2, 3, 4 or 8 bits, as GPTQ stores it */
  VQ_MATRIX_DENSE = 1, /* floats, rounded to 8 bits here; scale = largest / 127, in binary16 */
  VQ_MATRIX_TCQ = 2,   /* trellis states along the outputs, values from a table of 256 */
  VQ_MATRIX_VQ = 3,    /* vectors along the outputs, one or two codebooks */
  VQ_MATRIX_LAYERED = 4, /* 8 bits in two layers of 4, for the head of a decoder */
  VQ_MATRIX_MAX_PARTS = 4096,
  VQ_MATRIX_MAX_CODES = 65536
};

/* One part: some outputs (rows), of all columns. group_size: columns per scale, 32, 64, a multiple
 * of 128, or 0 for one group; G = number of groups.
 *
 * With extends_columns a part covers the columns behind those of the part before it, in the same
 * rows; both are VQ. y is the sum over the parts of a row, in order. Groups of 128 columns that
 * share an activation scale begin anew with every such part. Where there are any, all rows of the
 * matrix are cut at the same columns.
 *
 * GRID   codes: int32 [ceil(in * bits / 32)][out], every output's codes one bit stream, lowest bit
 *        first; or, with codes_are_bytes, uint8 [in][out]. zeros: uint8 [G][out], NULL for
 *        2^(bits-1). scales: binary16 [G][out].
 * DENSE  codes: float32 [out][in], or binary16 with weights_are_half.
 * TCQ    codes: uint8 [in][ceil(out * bits / 8)], bits 1..5; symbol r of a column is its bits
 *        [r * bits, +bits), lowest first; state s_r = its trellis_bits (10..16) bits that end with
 *        symbol r, 0 before the first. Value = table[((s * multiplier) mod 2^trellis_bits) >>
 *        (trellis_bits - 8)] * scales[g][r]. scales: binary16 [G][out]; table: int8 [256].
 * VQ     indices: uint16 [ceil(out / vector_length)][in] per stage; index i stands for the
 *        vector_length (1..16) outputs from vector_length * row on. codebooks: binary16
 *        [num_codes][vector_length] per stage; rounded to int8, one scale per component.
 * LAYERED  codes: floats as DENSE; or, with codes_are_bytes, int8 [out][in] and scales binary16
 *        [out]. One group; the only part of its matrix. Products are those of DENSE. The upper four
 *        bits of all codes lie before the lower ones, so that a decoder can do without most of those
 *        (vqdecoder.h). */
typedef struct vq_matrix_part {
  int32_t kind;
  int32_t in_features;
  int32_t out_features;
  int32_t bits;
  int32_t group_size;
  int32_t extends_columns;
  int32_t codes_are_bytes;
  int32_t weights_are_half;
  int32_t trellis_bits;
  int32_t multiplier; /* odd */
  int32_t vector_length;
  int32_t num_stages;
  int32_t num_codes[2];
  const void *codes;
  const uint8_t *zeros;
  const uint16_t *scales;
  const int8_t *table;
  const uint16_t *indices[2];
  const uint16_t *codebooks[2];
} vq_matrix_part;

/* What happens to x before the weights see it, and to y after; every pointer may be NULL. Column j
 * of the weights reads x[permutation[j]] * column_scales[permutation[j]];
 * sum_i x[i] * column_bias[i] is added to every output, then row_bias [out of all parts]. */
typedef struct vq_matrix_transform {
  const int32_t *permutation;
  const float *column_scales;
  const float *column_bias;
  const float *row_bias;
} vq_matrix_transform;

typedef struct vq_matrix vq_matrix;

/* Bytes of packed memory that vq_matrix_create needs. */
VQ_API int32_t vq_matrix_get_size(const vq_matrix_part *parts, int32_t num_parts, int64_t *bytes);

/* Packs the parts. memory: 64-byte aligned, of vq_matrix_get_size bytes, must outlive the matrix;
 * NULL: the matrix allocates. is_packed: memory already holds what an earlier call packed there
 * (codes, zeros and weights are not read then). transform may be NULL. Other pointers are not
 * kept. */
VQ_API int32_t vq_matrix_create(const vq_matrix_part *parts, int32_t num_parts,
                                const vq_matrix_transform *transform, void *memory,
                                int32_t is_packed, vq_matrix **matrix);

/* NULL is allowed. */
VQ_API void vq_matrix_free(vq_matrix *matrix);

/* y [batch][out_features] from x [batch][in_features]. exact: float32 activations, weights as the
 * checkpoint means them, no int8 (DENSE: as rounded). pool may be NULL. */
VQ_API int32_t vq_matrix_multiply(const vq_matrix *matrix, const float *x, int32_t batch, float *y,
                                  int32_t exact, vq_pool *pool);

/* Rows of the weight as float32 [count][in_features], column scales and permutation undone, without
 * row_bias. */
VQ_API int32_t vq_matrix_read_rows(const vq_matrix *matrix, const int32_t *rows, int32_t count,
                                   float *weights);

/* Search of sparse convex codes. A state of a latent z is at most max_support codes with positive
 * numerators that sum to denominator; its error is |z - sum numerator_i / denominator * code_i|^2.
 * Of every latent the `count` best states found are written, best first. States are canonical:
 * heaviest code first, ties by lower index; unused slots have numerator 0 and repeat slot 0's
 * index. Where fewer than count states were found, the first is repeated with an infinite error.
 *
 * Supports of one are searched whole. Pairs are searched whole among those whose heavier code is
 * one of the `heavy` nearest; the heavier it is, the fewer: half as many at a weight of 5/8, 1/8 at
 * 3/4, 1/32 at 7/8, at least 16 (with `exact` = 1: all pairs). Supports of t = 3 and 4 grow from the
 * `beam` best supports of t - 1. Every tier gives the same bits. */
typedef struct vq_lattice_job {
  const float *latents;  /* [num_latents][num_features] */
  const float *codebook; /* [num_codes][num_features] */
  int32_t num_latents;
  int32_t num_features;
  int32_t num_codes;
  int32_t max_support; /* <= num_codes and <= denominator */
  int32_t denominator;
  int32_t heavy;
  int32_t beam;
  int32_t count;
  int32_t exact;
  int32_t reserved; /* must be 0 */
  float *errors;       /* [num_latents][count] */
  int64_t *indices;    /* [num_latents][count][max_support] */
  int64_t *numerators; /* likewise */
} vq_lattice_job;

/* Runs the job on the calling thread. VQ_ERR_NONFINITE: NaN or infinity in latents or codebook. */
VQ_API int32_t vq_lattice_search(const vq_lattice_job *job);

typedef struct vq_lattice_codebook vq_lattice_codebook;

/* Prepares a codebook [num_codes][num_features] for many searches at one denominator; free it with
 * vq_lattice_close. It copies the codes and may be shared by threads. Up to 4096 codes it holds a
 * table of 6 * num_codes^2 bytes. VQ_ERR_NONFINITE: NaN or infinity. */
VQ_API int32_t vq_lattice_open(const float *codebook, int32_t num_codes, int32_t num_features,
                               int32_t denominator, vq_lattice_codebook **opened);

/* NULL is allowed. */
VQ_API void vq_lattice_close(vq_lattice_codebook *codebook);

/* vq_lattice_search with the codes of `codebook`: the same bits. job->codebook is not read; sizes
 * and denominator must be the codebook's, else VQ_ERR_SHAPE. */
VQ_API int32_t vq_lattice_search_in(const vq_lattice_codebook *codebook, const vq_lattice_job *job);

/* ---- Soft convex quantization (SCQ): exact solver ----
 *
 * For every latent z [num_features] over codes c_k [num_codes][num_features], weights p >= 0 with
 * sum 1 that minimise |z - sum_k p_k c_k|^2 + lam |p - e_j|^2, where j is the nearest code
 * (objective VQ_SCQ_NEAREST), or ... + lam |p|^2 (VQ_SCQ_RIDGE). A primal active set in float64;
 * codes are found by float32 scans whose rounding is bounded, so that no code is overlooked. */

enum {
  VQ_SCQ_NEAREST = 0,
  VQ_SCQ_RIDGE = 1,
  VQ_SCQ_MAX_CODES = 1 << 20,
  VQ_SCQ_MAX_FEATURES = 1024
};

/* latents and codebook are both float (is_double = 0) or both double (1), row by row, finite.
 * tolerance: accepted p.g - min g relative to R (|z| + R) + lam, with g half the gradient and R the
 * largest code norm, both about the mean of the codes. initial: NULL or [num_latents]
 * [initial_width] codes to start from, negative ones are skipped. */
typedef struct vq_scq_problem {
  const void *latents;
  const void *codebook;
  const int64_t *initial;
  int64_t num_latents;
  double lam;
  double tolerance;
  int32_t num_codes;
  int32_t num_features;
  int32_t is_double;
  int32_t objective;
  int32_t max_iterations;
  int32_t initial_width;
} vq_scq_problem;

/* The first sizes[i] of the max_support slots of row i hold its codes and weights, the others code
 * 0 and weight 0. nearest: the nearest code. quantized: sum_k p_k c_k. kkt_residual: p.g - min g.
 * unsolved: 1 where a support outgrew max_support, became dependent, or iterations ran out; such
 * rows hold no answer. */
typedef struct vq_scq_solution {
  int64_t *indices;     /* [num_latents][max_support] */
  double *weights;      /* [num_latents][max_support] */
  int64_t *sizes;       /* [num_latents] */
  int64_t *nearest;     /* [num_latents] */
  int64_t *iterations;  /* [num_latents] */
  double *kkt_residual; /* [num_latents] */
  double *quantized;    /* [num_latents][num_features] */
  uint8_t *unsolved;    /* [num_latents] */
  int32_t max_support;
  int32_t reserved; /* must be 0 */
} vq_scq_solution;

/* Supports as above and what arrives from above: dL/dp on the slots, dL/dz_q, either may be NULL.
 * grad_codebook is added to. */
typedef struct vq_scq_gradient {
  const int64_t *indices;       /* [num_latents][max_support] */
  const double *weights;        /* [num_latents][max_support] */
  const int64_t *sizes;         /* [num_latents] */
  const double *grad_weights;   /* [num_latents][max_support] or NULL */
  const double *grad_quantized; /* [num_latents][num_features] or NULL */
  double *grad_latents;         /* [num_latents][num_features] */
  double *grad_codebook;        /* [num_codes][num_features] */
  int32_t max_support;
  int32_t reserved; /* must be 0 */
} vq_scq_gradient;

/* Solve; every tier and thread count gives the same bits. pool may be NULL. */
VQ_API int32_t vq_scq_solve(const vq_scq_problem *problem, const vq_scq_solution *solution,
                            vq_pool *pool);

/* Implicit differentiation on the supports; the one-hot of the nearest code is a constant. */
VQ_API int32_t vq_scq_differentiate(const vq_scq_problem *problem, const vq_scq_gradient *gradient,
                                    vq_pool *pool);

/* Plain vector quantization by the solver's scan: the nearest code of every latent, the lower index
 * in a tie, as if computed in float64. */
VQ_API int32_t vq_scq_nearest(const vq_scq_problem *problem, int64_t *indices, vq_pool *pool);

/* SCQ1 frames, version 2 (docs/scq1.md): sparse convex codes to bytes and back, with integers only.
 * Why bytes are no frame, or codes cannot be packed: */
typedef enum vq_scq1_reason {
  VQ_SCQ1_GOOD = 0,
  VQ_SCQ1_HEADER = 1,     /* the header, or a varint behind it, is out of form */
  VQ_SCQ1_CHECK = 2,      /* a checksum does not fit */
  VQ_SCQ1_LENGTH = 3,     /* lengths and bytes do not fit together */
  VQ_SCQ1_TABLES = 4,     /* entropy tables are needed and not there, or are no tables */
  VQ_SCQ1_REFERENCE = 5,  /* the reference is missing or another one */
  VQ_SCQ1_STREAM = 6,     /* a rANS stream does not begin or end as it must */
  VQ_SCQ1_RANK = 7,       /* a RAW chunk lies beyond its last rank */
  VQ_SCQ1_STATE = 8,      /* a latent names a code twice or changes weights that are fixed */
  VQ_SCQ1_ASSIGNMENT = 9  /* indices or numerators given are not of the model */
} vq_scq1_reason;

enum { VQ_SCQ1_AUTO = 0, VQ_SCQ1_RAW = 1, VQ_SCQ1_RANS = 2 };

/* A model's numbers. Cluster maps hold num_codes entries; NULL (both): no tables. frequencies: the
 * tables base, support, mode, new, swap, other, then for t = 2 .. max_support partition, slot,
 * reweight and swap_weights of t, row by row, without those that do not exist. */
typedef struct vq_scq1_profile {
  int32_t num_codes;
  int32_t max_support;
  int32_t denominator; /* a power of two */
  int32_t reserved;    /* must be 0 */
  const uint16_t *base_cluster;
  const uint16_t *other_cluster;
  const uint16_t *frequencies;
  int64_t num_frequencies;
} vq_scq1_profile;

typedef struct vq_scq1_model vq_scq1_model;

/* Arrays of indices and numerators are [rows * columns][max_support]; reference arrays may be NULL.
 * state[0] becomes 1 if the frame was complete, 0 if only its base layer was had. */
typedef struct vq_scq1_frame {
  const uint8_t *codes;
  int64_t num_bytes;
  int32_t rows;
  int32_t columns;
  const int64_t *reference_indices;
  const int64_t *reference_numerators;
  int64_t *indices;
  int64_t *numerators;
  int32_t *state; /* [1] */
  int32_t allow_partial;
} vq_scq1_frame;

/* With a reference: a delta frame (width, height, letterboxed and entropy are not used). tile 0: one
 * tile. state: bytes written, bytes up to the end of the base layer, 1 for rANS, then how many
 * latents took SKIP, REWEIGHT, SWAP1, NEW. */
typedef struct vq_scq1_request {
  const int64_t *indices;
  const int64_t *numerators;
  const int64_t *reference_indices;
  const int64_t *reference_numerators;
  int32_t rows;
  int32_t columns;
  int32_t width;
  int32_t height;
  int32_t letterboxed;
  int32_t tile;
  int32_t entropy;
  uint8_t model_hash[4];
  uint8_t *codes;
  int64_t capacity; /* bytes at codes; too few: VQ_ERR_SHAPE */
  int32_t *state;   /* [7] */
} vq_scq1_request;

/* Prepares a model; free it with vq_scq1_close. It copies the arrays and may be shared by threads.
 * VQ_ERR_SHAPE: no SCQ1 profile, or tables that are none. */
VQ_API int32_t vq_scq1_open(const vq_scq1_profile *profile, vq_scq1_model **model);

/* NULL is allowed. */
VQ_API void vq_scq1_close(vq_scq1_model *model);

/* Both return VQ_OK and a reason: outputs are useful only for VQ_SCQ1_GOOD. */
VQ_API int32_t vq_scq1_unpack(const vq_scq1_model *model, const vq_scq1_frame *frame,
                              int32_t *reason);
VQ_API int32_t vq_scq1_pack(const vq_scq1_model *model, const vq_scq1_request *request,
                            int32_t *reason);

#ifdef __cplusplus
}
#endif

#endif /* VQKERNELS_H */
