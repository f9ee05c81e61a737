"""The CMake build: C++ tests pass, tiers keep to their instructions, no compiler is no error."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WIDE_REGISTER = re.compile(r"%[yz]mm\d")
ZMM_REGISTER = re.compile(r"%zmm\d")
TIERS = ("avx2", "avx512_vnni", "avx512_vbmi")
TIER_SOURCES = {
    f"{path.stem}.cpp.o" for tier in TIERS for path in ROOT.glob(f"csrc/cpu/*_{tier}.cpp")
}


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, **environment},
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{output[-4000:]}"
    return output


def require(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def build_dir() -> Path:
    """A build of library and C++ tests; kept, so that the next run compiles what changed."""
    require("cmake", "c++")
    build = ROOT / "build" / "tests"
    configured = run(["cmake", "-S", str(ROOT), "-B", str(build), "-DVQSTACK_BUILD_TESTS=ON"])
    assert "native CPU kernels ON" in configured
    built = run(["cmake", "--build", str(build), "--parallel", "2"])
    assert "warning:" not in built
    return build


def objects(build: Path) -> dict[str, Path]:
    """Objects of the library by name; the kept build may hold some of sources that are gone."""
    paths = (path for path in build.rglob("*.o") if "vqkernels_objects" in str(path))
    return {path.name: path for path in paths if (ROOT / "csrc/cpu" / path.stem).is_file()}


def disassemble(path: Path) -> str:
    return run(["objdump", "-d", "--no-show-raw-insn", str(path)])


def test_cpp_tests_pass(build_dir: Path) -> None:
    output = run(["ctest", "--test-dir", str(build_dir), "--output-on-failure"])
    assert "100% tests passed" in output
    assert "test_matrix" in output


def test_only_tier_objects_use_wide_registers(build_dir: Path) -> None:
    require("objdump")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("tiers exist on x86-64 only")
    all_objects = objects(build_dir)
    assert set(all_objects) > TIER_SOURCES
    for name in set(all_objects) - TIER_SOURCES:
        assert not WIDE_REGISTER.search(disassemble(all_objects[name])), name


def test_tier_objects_use_the_instructions_they_are_for(build_dir: Path) -> None:
    require("objdump")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("tiers exist on x86-64 only")
    for name in sorted(TIER_SOURCES):
        code = disassemble(objects(build_dir)[name])
        assert bool(ZMM_REGISTER.search(code)) == ("_avx512_" in name), name
    assert "vpmaddubsw" in disassemble(objects(build_dir)["matrix_avx2.cpp.o"])
    assert "vpdpbusd" in disassemble(objects(build_dir)["matrix_avx512_vnni.cpp.o"])
    assert "vpermi2b" not in disassemble(objects(build_dir)["matrix_avx512_vnni.cpp.o"])
    assert "vpmultishiftqb" in disassemble(objects(build_dir)["matrix_avx512_vbmi.cpp.o"])


def test_no_tier_object_contracts_multiply_and_add(build_dir: Path) -> None:
    require("objdump")
    for name, path in objects(build_dir).items():
        assert not re.search(r"\bvfn?m(add|sub)\d", disassemble(path)), name


def test_library_exports_the_c_abi_only(build_dir: Path) -> None:
    require("nm")
    library = next(build_dir.rglob("libvqkernels_cpu.so"))
    table = run(["nm", "-D", "--defined-only", str(library)])
    names = {line.split()[-1] for line in table.splitlines() if line}
    headers = (path.read_text(encoding="utf-8") for path in ROOT.glob("csrc/include/*.h"))
    declaration = re.compile(r"^VQ_API .*?\b(vq_\w+)\(", flags=re.MULTILINE)
    declared = {name for header in headers for name in declaration.findall(header)}
    assert names == declared


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "no working C++ compiler"),
        (["-DCMAKE_CXX_COMPILER=/bin/false"], "could not build a small C++17 program"),
        (["-DVQSTACK_NATIVE=OFF"], "VQSTACK_NATIVE=OFF"),
    ],
)
def test_configure_and_install_succeed_without_native_code(
    tmp_path: Path, options: list[str], reason: str
) -> None:
    require("cmake")
    configured = run(["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options], CXX="/bin/false")
    flat = " ".join(configured.split())
    assert "native CPU kernels OFF" in flat
    assert "executors 'onnx' and 'torch' remain" in flat
    run(["cmake", "--build", str(tmp_path)])
    run(["cmake", "--install", str(tmp_path), "--prefix", str(tmp_path / "prefix")])
    info = json.loads((tmp_path / "prefix/vqkernels/_build_info.json").read_text(encoding="utf-8"))
    assert info["native"] is False
    assert reason in info["reason"]


def test_cpp_tests_pass_under_sanitizers() -> None:
    require("cmake", "c++")
    build = str(ROOT / "build" / "tests-sanitized")
    options = ["-DVQSTACK_BUILD_TESTS=ON", "-DVQSTACK_SANITIZE=ON"]
    run(["cmake", "-S", str(ROOT), "-B", build, *options])
    run(["cmake", "--build", build, "--parallel", "2"])
    run(["ctest", "--test-dir", build, "--output-on-failure"])
