// Which tier runs. Knows cpuid, knows nothing of the layouts.
#pragma once

#include "q4_kernels.hpp"

namespace vq {

// The entry point of the current tier.
Q4PanelsFn q4_panels();

}  // namespace vq
