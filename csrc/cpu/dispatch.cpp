// Run-time choice of the tier: cpuid says what the CPU has, XCR0 (xgetbv) whether the operating
// system saves those registers. Compiled without target flags.
#include "dispatch.hpp"

#include <array>
#include <atomic>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define VQ_X86 1
#endif

namespace vq {
namespace {

struct Tier {
  const char *name;
  bool supported = false;
  const LatticeOps *lattice = nullptr;
  const MatrixOps *matrix = nullptr;
  const ScqOps *scq = nullptr;
  const SweepOps *sweep = nullptr;
};

#if defined(VQ_X86)

constexpr unsigned kXcr0Avx = 0x06;     // SSE and AVX state
constexpr unsigned kXcr0Avx512 = 0xe6;  // and opmask, upper halves of zmm0..15, zmm16..31

struct Features {
  bool avx2 = false;
  bool avx512_vnni = false;
  bool avx512_vbmi = false;
};

bool has_bit(unsigned word, int bit) {
  return ((word >> bit) & 1u) != 0;
}

unsigned read_xcr0() {
  unsigned low = 0;
  unsigned high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Features detect() {
  Features found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !has_bit(c, 27) || !has_bit(c, 28)) {
    return found;  // no OSXSAVE or no AVX
  }
  const bool has_f16c = has_bit(c, 29);
  const unsigned xcr0 = read_xcr0();
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) {
    return found;
  }
  found.avx2 = (xcr0 & kXcr0Avx) == kXcr0Avx && has_bit(b, 5) && has_f16c;
  const bool f_bw_vl = has_bit(b, 16) && has_bit(b, 30) && has_bit(b, 31);
  found.avx512_vnni =
      found.avx2 && (xcr0 & kXcr0Avx512) == kXcr0Avx512 && f_bw_vl && has_bit(c, 11);
  found.avx512_vbmi = found.avx512_vnni && has_bit(c, 1);
  return found;
}

#endif  // VQ_X86

using Tiers = std::array<Tier, 4>;

Tiers make_tiers() {
  Tiers tiers{{{"baseline", true, &lattice_ops_baseline, &matrix_ops_baseline, &scq_ops_baseline,
                &sweep_ops_baseline},
               {"avx2"},
               {"avx512_vnni"},
               {"avx512_vbmi"}}};
#if defined(VQ_X86)
  [[maybe_unused]] const Features found = detect();
#if defined(VQ_HAVE_AVX2)
  tiers[VQ_ISA_AVX2] = {"avx2",           found.avx2,    &lattice_ops_avx2,
                        &matrix_ops_avx2, &scq_ops_avx2, &sweep_ops_avx2};
#endif
#if defined(VQ_HAVE_AVX512_VNNI)
  tiers[VQ_ISA_AVX512_VNNI] = {"avx512_vnni",
                               found.avx512_vnni,
                               &lattice_ops_avx512_vnni,
                               &matrix_ops_avx512_vnni,
                               &scq_ops_avx512_vnni,
                               &sweep_ops_avx512_vnni};
#endif
#if defined(VQ_HAVE_AVX512_VNNI) && defined(VQ_HAVE_AVX512_VBMI)
  // Kernels without byte permutes are those of the tier below.
  Tier &vbmi = tiers[VQ_ISA_AVX512_VBMI];
  vbmi = tiers[VQ_ISA_AVX512_VNNI];
  vbmi.name = "avx512_vbmi";
  vbmi.matrix = &matrix_ops_avx512_vbmi;
  vbmi.supported = found.avx512_vbmi;
#endif
#endif
  return tiers;
}

const Tiers &tiers() {
  static const Tiers all = make_tiers();
  return all;
}

bool is_tier(std::int32_t isa) {
  return isa >= 0 && isa < static_cast<std::int32_t>(tiers().size());
}

std::int32_t best_isa() {
  std::int32_t isa = static_cast<std::int32_t>(tiers().size()) - 1;
  while (!tiers()[isa].supported) {
    --isa;  // ends at the baseline, which always runs
  }
  return isa;
}

std::atomic<std::int32_t> &current_isa() {
  static std::atomic<std::int32_t> isa{best_isa()};
  return isa;
}

const Tier &current_tier() {
  return tiers()[current_isa().load(std::memory_order_relaxed)];
}

}  // namespace

const LatticeOps &lattice_ops() {
  return *current_tier().lattice;
}

const MatrixOps &matrix_ops() {
  return *current_tier().matrix;
}

const ScqOps &scq_ops() {
  return *current_tier().scq;
}

const SweepOps &sweep_ops() {
  return *current_tier().sweep;
}

}  // namespace vq

const char *vq_isa_name(std::int32_t isa) {
  return vq::is_tier(isa) ? vq::tiers()[isa].name : "unknown";
}

std::int32_t vq_isa_supported(std::int32_t isa) {
  return vq::is_tier(isa) && vq::tiers()[isa].supported ? 1 : 0;
}

std::int32_t vq_get_isa(void) {
  return vq::current_isa().load(std::memory_order_relaxed);
}

std::int32_t vq_set_isa(std::int32_t isa) {
  if (isa == VQ_ISA_AUTO) {
    isa = vq::best_isa();
  }
  if (vq_isa_supported(isa) == 0) {
    return VQ_ERR_ISA;
  }
  vq::current_isa().store(isa, std::memory_order_relaxed);
  return VQ_OK;
}
