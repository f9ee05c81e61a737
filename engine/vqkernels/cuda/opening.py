"""From a torch device to a `Gpu`: the kernels compiled or found, loaded, ready to launch."""

from __future__ import annotations

from pathlib import Path

import torch

from vqkernels.cuda.driver import CudaModule
from vqkernels.cuda.gpu import Gpu
from vqkernels.cuda.image import kernel_image


def open_gpu(cache: Path, device: torch.device) -> Gpu:
    """Kernels for a device; `cache` is the folder that keeps what was compiled.

    Raises:
        NativeUnavailableError: no compiler, or it failed.
        CudaUnavailableError: no driver, or it refused the kernels.
    """
    capability = torch.cuda.get_device_capability(device)
    image = kernel_image(cache, (capability[0], capability[1]))
    return Gpu(CudaModule(image, device.index or 0), device)
