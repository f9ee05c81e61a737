/* C ABI of the decode step, part of libvqkernels_cpu; see vqkernels.h for its conventions.
 *
 * A decoder of the llama family (llama, mistral, qwen2) over packed matrices, with a KV cache cut
 * into pages. One call runs a batch of chunks: new tokens of sequences that stand at different
 * positions. Rows are computed one by one in a fixed order: logits do not depend on what else is in
 * the batch, on how a prompt is cut into chunks, or on the number of threads; every tier gives the
 * same bits as the others. */
#ifndef VQDECODER_H
#define VQDECODER_H

#include "vqkernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vq_decoder vq_decoder;

enum {
  VQ_FLOAT32 = 0,
  VQ_FLOAT16 = 1,
  VQ_BFLOAT16 = 2,
  VQ_INT8 = 3,      /* with a float scale per row */
  VQ_KV_BLOCK = 16, /* page_size is a multiple */
  VQ_MAX_PARTS = 3, /* matrices that share an input: q, k, v */
  VQ_ERR_RANGE = 16 /* a vq_status: a token, a position or a page does not exist */
};

/* R = diag(signs) (I kron base kron H_2^power) / sqrt(order * 2^power); a row x turns into x R.
 * base[a * order + c] is the factor of x[a] in output c. */
typedef struct vq_rotation {
  int32_t size; /* a multiple of order * 2^power; 0: no rotation */
  int32_t order;
  int32_t power;
  int32_t reserved;
  const int8_t *signs; /* [size] */
  const int8_t *base;  /* [order][order] */
} vq_rotation;

/* Matrices of one input whose outputs stand behind each other; unused ones are NULL. */
typedef struct vq_projection {
  const vq_matrix *parts[VQ_MAX_PARTS];
} vq_projection;

typedef struct vq_decoder_layer {
  const float *input_norm;          /* [hidden_size] */
  const float *post_attention_norm; /* [hidden_size] */
  vq_projection qkv;
  vq_projection output;
  vq_projection gate_up;
  vq_projection down;
  int32_t sliding_window; /* a position sees this many, itself included; 0: all */
  int32_t reserved;       /* must be 0 */
} vq_decoder_layer;

typedef struct vq_decoder_config {
  int32_t vocab_size;
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t num_layers;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t num_positions;  /* rows of cosines and sines, the longest sequence */
  int32_t page_size;
  int32_t num_pages;
  int32_t kv_bits;     /* 16, 8 or 4 */
  int32_t max_rows;    /* tokens computed together; longer chunks go in several passes */
  int32_t num_threads; /* the most that a pool may have */
  int32_t exact;       /* 1: float32 activations and the weights as stored; slow */
  float rms_norm_eps;
} vq_decoder_config;

/* Everything but the norms is kept by address and must outlive the decoder. */
typedef struct vq_decoder_weights {
  const vq_decoder_layer *layers; /* [num_layers] */
  const float *final_norm;        /* [hidden_size] */
  const void *embedding;          /* [vocab_size][hidden_size] */
  const float *embedding_scales;  /* [vocab_size], for VQ_INT8 only */
  const vq_matrix *head;          /* vocab_size outputs */
  const float *cosines;           /* [num_positions][head_dim / 2] */
  const float *sines;
  vq_rotation residual; /* after the look-up, and undone before the final norm */
  vq_rotation down;     /* of the input of `down` */
  int32_t embedding_type;
  int32_t reserved; /* must be 0 */
} vq_decoder_weights;

/* Chunk i has the tokens [token_offsets[i], token_offsets[i + 1]) at the positions starts[i] and
 * on, the page table [page_offsets[i], page_offsets[i + 1]) that covers them and all before, and
 * wants logits after its last num_logits[i] tokens. */
typedef struct vq_decode_batch {
  int32_t num_chunks;
  int32_t num_logit_rows;       /* sum of num_logits */
  const int32_t *token_ids;
  const int32_t *token_offsets; /* [num_chunks + 1], from 0 */
  const int32_t *pages;
  const int32_t *page_offsets;  /* [num_chunks + 1], from 0 */
  const int32_t *starts;        /* [num_chunks] */
  const int32_t *num_logits;    /* [num_chunks] */
  float *logits;                /* [num_logit_rows][vocab_size] */
  /* [num_chunks]; n > 0: only the largest of every token's first n logits is wanted, bit for bit, and
   * no other of them above it. With a LAYERED head the others may then come from the upper four bits
   * of its weights, more or fewer of them for another number of threads or another batch; the largest
   * is among those with a probability of 3e-7. 0: all are wanted. NULL: 0 for all chunks. */
  const int32_t *largest_of;
} vq_decode_batch;

/* Operation classes: each includes what stands before its matrix (norm, activation function,
 * quantization). */
typedef enum vq_decoder_phase {
  VQ_PHASE_EMBED = 0,
  VQ_PHASE_QKV = 1,
  VQ_PHASE_CACHE = 2, /* rotary embedding and cache writes */
  VQ_PHASE_ATTENTION = 3,
  VQ_PHASE_OUTPUT = 4,
  VQ_PHASE_GATE_UP = 5,
  VQ_PHASE_DOWN = 6,
  VQ_PHASE_HEAD = 7,
  VQ_NUM_PHASES = 8
} vq_decoder_phase;

/* Nanoseconds by operation class, as one thread saw them, and how many steps. */
typedef struct vq_decoder_profile {
  int64_t steps;
  int64_t nanoseconds[VQ_NUM_PHASES];
} vq_decoder_profile;

/* Allocates the cache and all scratch; a step allocates nothing. VQ_ERR_SHAPE: sizes are out of
 * range or a matrix has another shape than the config implies. */
VQ_API int32_t vq_decoder_create(const vq_decoder_config *config,
                                 const vq_decoder_weights *weights, vq_decoder **decoder);

/* NULL is allowed. No step may be running. */
VQ_API void vq_decoder_free(vq_decoder *decoder);

/* Runs the batch; pool may be NULL. One step at a time. VQ_ERR_RANGE: a token, position or page
 * does not exist, nothing was computed. VQ_ERR_NONFINITE: an activation overflowed. */
VQ_API int32_t vq_decoder_step(vq_decoder *decoder, const vq_decode_batch *batch, vq_pool *pool);

/* Copies the keys and values of a page over those of another one. */
VQ_API int32_t vq_decoder_copy_page(vq_decoder *decoder, int32_t source, int32_t target);

/* Bytes of one page, all layers; 0 for NULL. */
VQ_API int64_t vq_decoder_page_bytes(const vq_decoder *decoder);

/* Copies the counters out and starts them anew; times are taken from the first call on. */
VQ_API int32_t vq_decoder_take_profile(vq_decoder *decoder, vq_decoder_profile *profile);

/* Reads all of data (64-byte aligned, a multiple of 64 bytes) once, split over the pool, as fast as
 * the current tier can: the ceiling that weights can be streamed at. checksum: [1]. */
VQ_API int32_t vq_read_all(const void *data, int64_t num_bytes, vq_pool *pool, float *checksum);

#ifdef __cplusplus
}
#endif

#endif /* VQDECODER_H */
