// The instructions of the matrix units and of asynchronous copies, as functions: PTX on a GPU, and
// the emulation of the same layouts on the CPU.
#pragma once

#include "common.cuh"

namespace vq {

#if !defined(VQ_CUDA_EMULATION)
VQ_INLINE unsigned shared_address(const void *pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// Starts copying BYTES (4, 8 or 16, both sides aligned to them) of global memory to shared memory;
// where the source is not `inside` the array, zeros are written and nothing is read.
template <int BYTES>
VQ_INLINE void copy_async(void *target, const void *source, bool inside) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async takes");
  const int copied = inside ? BYTES : 0;
#if defined(VQ_CUDA_EMULATION)
  vq_emulation::copy_async(target, source, copied, BYTES);
#else
  const unsigned to = shared_address(target);
  const unsigned long long from = __cvta_generic_to_global(source);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copied)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(copied),
                 "n"(BYTES)
                 : "memory");
  }
#endif
}

// Closes a group of this thread's copies.
VQ_INLINE void commit_copies() {
#if defined(VQ_CUDA_EMULATION)
  vq_emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when all but this thread's last PENDING groups have arrived.
template <int PENDING>
VQ_INLINE void wait_copies() {
#if defined(VQ_CUDA_EMULATION)
  vq_emulation::wait_copies(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Four 8 x 8 matrices of halves from shared memory: lanes 8 i .. 8 i + 7 give the rows of matrix i.
template <bool TRANSPOSED>
VQ_INLINE void load_matrices(unsigned (&registers)[4], const __half *row) {
#if defined(VQ_CUDA_EMULATION)
  vq_emulation::load_matrices(registers, row, TRANSPOSED);
#else
  const unsigned from = shared_address(row);
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// d += a b for a (16 x 16) by rows and b (16 x 8) by columns, in the fragments of mma.m16n8k16.
VQ_INLINE void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if defined(VQ_CUDA_EMULATION)
  vq_emulation::multiply_add(d, a, b0, b1);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace vq
