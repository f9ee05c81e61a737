// What the library says of itself: its version, and statuses in words.
#include <cstdint>

#include "vqkernels.h"

std::int32_t vq_abi_version(void) {
  return VQ_ABI_VERSION;
}

const char *vq_status_text(std::int32_t status) {
  switch (status) {
    case VQ_OK:
      return "ok";
    case VQ_ERR_NULL:
      return "a required pointer is NULL";
    case VQ_ERR_SHAPE:
      return "a size is out of range or one that the kernels do not take";
    case VQ_ERR_ISA:
      return "this build or this CPU cannot run the instruction-set tier";
    case VQ_ERR_NONFINITE:
      return "an activation is NaN or infinite";
    case VQ_ERR_MEMORY:
      return "memory or threads could not be allocated";
    case VQ_ERR_FORKED:
      return "the thread pool was created before a fork; create it in the child process";
    default:
      return "unknown status";
  }
}
