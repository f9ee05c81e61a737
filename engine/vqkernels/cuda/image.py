"""Where the compiled CUDA kernels come from: the cache, nvcc, or NVRTC, in this order.

The sources are package data (or lie in csrc/cuda of a source tree). What was compiled is kept under
the digest of sources and options, so a stale image is never used. Knows no GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vqkernels.errors import NativeUnavailableError

_log = logging.getLogger(__name__)

ENTRY = "vqkernels.cu"
# One binary per tested architecture, and PTX for those that came later.
TARGETS = (
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_80,code=compute_80",
)
# The targets are compiled at once, and the kernels of each on all cores.
NVCC_OPTIONS = ("-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v")
_PARALLEL = ("--threads", "0", "--split-compile", "0")


def kernel_sources() -> Path:
    """Folder of the CUDA sources.

    Raises:
        NativeUnavailableError: neither the package nor a source tree around it has them.
    """
    package = Path(__file__).parent
    for folder in (package / "src", package.parents[2] / "csrc" / "cuda"):
        if (folder / ENTRY).is_file():
            return folder
    raise NativeUnavailableError("the CUDA sources are not installed; reinstall vqstack")


def kernel_image(cache: Path, capability: tuple[int, int]) -> bytes:
    """A fatbin (nvcc) or a cubin for one device (NVRTC) of all kernels, compiled at most once.

    Args:
        cache: folder that keeps what was compiled.
        capability: compute capability of the device, for NVRTC.

    Raises:
        NativeUnavailableError: no compiler did it; carries the first lines of each.
    """
    sources = kernel_sources()
    digest = source_digest(sources)[:16]
    fatbin = cache / f"vqkernels-{digest}.fatbin"
    cubin = cache / f"vqkernels-{digest}.sm_{capability[0]}{capability[1]}.cubin"
    for path in (fatbin, cubin):
        if path.is_file():
            return path.read_bytes()
    nvcc = find_nvcc()
    try:
        image = compile_nvcc(nvcc, sources)[0] if nvcc else None
    except NativeUnavailableError as error:
        _log.warning("%s; trying NVRTC", error)
        image = None
    if image is not None:
        _keep(fatbin, image)
        return image
    image = compile_nvrtc(sources, capability)
    _keep(cubin, image)
    return image


def source_digest(sources: Path) -> str:
    """SHA-256 over names and contents of the sources, over the targets and the options."""
    digest = hashlib.sha256("\n".join((*TARGETS, *NVCC_OPTIONS)).encode())
    for path in sorted(sources.glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def find_nvcc() -> str | None:
    """nvcc on PATH, or in the toolkit that CUDA_HOME or the usual folder holds."""
    folders = [root / "bin" for root in _toolkits()]
    found = (shutil.which("nvcc"), *(shutil.which("nvcc", path=str(f)) for f in folders))
    return next((path for path in found if path), None)


def compile_nvcc(nvcc: str, sources: Path) -> tuple[bytes, str]:
    """The fatbin for `TARGETS`, and what ptxas says of registers and spills.

    Raises:
        NativeUnavailableError: nvcc failed.
    """
    targets = [f"-gencode={target}" for target in TARGETS]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.fatbin"
        command = [nvcc, "--fatbin", *NVCC_OPTIONS, *_PARALLEL, *targets]
        done = subprocess.run(
            [*command, str(sources / ENTRY), "-o", str(output)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NativeUnavailableError(f"nvcc failed: {done.stderr[:2000]}")
        return output.read_bytes(), done.stderr


def compile_nvrtc(sources: Path, capability: tuple[int, int]) -> bytes:
    """A cubin for one architecture, by the NVRTC library that torch's CUDA build brings.

    Raises:
        NativeUnavailableError: no NVRTC or no CUDA headers were found, or it refused the sources.
    """
    found, headers = find_nvrtc()
    library = ctypes.CDLL(str(found))
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}",
        "--std=c++17",
        f"--include-path={sources}",
        f"--include-path={headers}",
    ]
    program = ctypes.c_void_p()
    text = (sources / ENTRY).read_bytes()
    status = library.nvrtcCreateProgram(ctypes.byref(program), text, ENTRY.encode(), 0, None, None)
    if status:
        raise NativeUnavailableError(f"NVRTC failed with status {status}")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), arguments):
            log = _nvrtc_output(library, program, "ProgramLog")
            raise NativeUnavailableError(f"NVRTC failed: {log[:2000].decode(errors='replace')}")
        return _nvrtc_output(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def find_nvrtc() -> tuple[Path, Path]:
    """The NVRTC library and the folder of CUDA's headers.

    Raises:
        NativeUnavailableError: one of them is not there.
    """
    return _find_nvidia_file("libnvrtc.so*"), _find_nvidia_file("cuda_fp16.h").parent


def _nvrtc_output(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _find_nvidia_file(pattern: str) -> Path:
    """The first file of that name in the `nvidia` packages of torch, or in a toolkit."""
    for root in (*_nvidia_packages(), *_toolkits()):
        for path in sorted(root.rglob(pattern)):
            return path
    raise NativeUnavailableError(
        f"nvcc did not compile the kernels, and no {pattern} is in torch's nvidia packages; "
        "install the CUDA toolkit or torch with CUDA"
    )


def _nvidia_packages() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for root in [] if spec is None else spec.submodule_search_locations or []:
        yield Path(root)


def _toolkits() -> list[Path]:
    named = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return [Path(name) for name in named if name]


def _keep(path: Path, image: bytes) -> None:
    """Write under a scratch name and rename: another process may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(image)
    scratch.replace(path)
