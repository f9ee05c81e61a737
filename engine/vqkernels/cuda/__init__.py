"""The CUDA kernels: found or compiled on first use, launched on torch's current stream.

Nothing here is needed to import vqkernels, and nothing links against CUDA at build time.
"""

from vqkernels.cuda.codebook import CodebookArrays, CodebookWeights
from vqkernels.cuda.driver import CudaModule, CudaUnavailableError
from vqkernels.cuda.gptq import GptqArrays, GptqWeights
from vqkernels.cuda.gpu import Gpu
from vqkernels.cuda.image import kernel_image, kernel_sources
from vqkernels.cuda.opening import open_gpu
from vqkernels.cuda.trellis import TrellisArrays, TrellisWeights
from vqkernels.cuda.weights import CudaWeights

__all__ = [
    "CodebookArrays",
    "CodebookWeights",
    "CudaModule",
    "CudaUnavailableError",
    "CudaWeights",
    "GptqArrays",
    "GptqWeights",
    "Gpu",
    "TrellisArrays",
    "TrellisWeights",
    "kernel_image",
    "kernel_sources",
    "open_gpu",
]
