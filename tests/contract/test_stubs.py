"""The committed stubs are what the protos generate, and every part of the protos is explained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

PROTO_ROOT = Path(__file__).parents[2] / "proto"
PROTOS = sorted(path.relative_to(PROTO_ROOT) for path in PROTO_ROOT.glob("vqstack/*/v1/*.proto"))
STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")

# Field numbers of google.protobuf's descriptor messages, which source locations are made of.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, NESTED, MESSAGE_ENUM, ONEOF = 2, 3, 4, 8
VALUE, METHOD = 2, 2


def protoc(*arguments: str) -> None:
    """Run the compiler as `make proto` does, with the plugins that stand beside Python."""
    plugins = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{plugins}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *arguments, *map(str, PROTOS)]
    subprocess.run(command, cwd=PROTO_ROOT, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    protoc(
        f"--python_out={folder}",
        f"--mypy_out=quiet:{folder}",
        f"--grpc_python_out={folder}",
        f"--mypy_grpc_out=quiet:{folder}",
    )
    return folder


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pb2.FileDescriptorSet:
    path = tmp_path_factory.mktemp("descriptors") / "set.binpb"
    protoc("--include_source_info", f"--descriptor_set_out={path}")
    return descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())


def test_there_are_protos_to_check() -> None:
    packages = {str(path.parent) for path in PROTOS}
    assert packages == {"vqstack/admin/v1", "vqstack/generation/v1", "vqstack/tokenizer/v1"}


@pytest.mark.parametrize("suffix", STUB_SUFFIXES)
@pytest.mark.parametrize("proto", PROTOS, ids=lambda proto: proto.stem)
def test_committed_stubs_are_what_the_proto_generates(
    proto: Path, suffix: str, generated: Path
) -> None:
    stub = proto.with_name(proto.stem + suffix)
    committed = (PROTO_ROOT / stub).read_text()
    assert committed == (generated / stub).read_text(), f"{stub} drifted; run `make proto`"


def test_no_stub_is_left_without_a_proto() -> None:
    expected = {proto.with_name(proto.stem + end) for proto in PROTOS for end in STUB_SUFFIXES}
    committed = {path.relative_to(PROTO_ROOT) for path in PROTO_ROOT.glob("vqstack/**/*_pb2*")}
    assert {path for path in committed if path.suffix in (".py", ".pyi")} == expected


def elements(
    file: descriptor_pb2.FileDescriptorProto,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and source path of everything in a file that a reader needs explained."""
    for index, service in enumerate(file.service):
        yield service.name, (SERVICE, index)
        for number, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (SERVICE, index, METHOD, number)
    for index, enum in enumerate(file.enum_type):
        yield from enum_elements(enum, enum.name, (ENUM, index))
    for index, message in enumerate(file.message_type):
        yield from message_elements(message, message.name, (MESSAGE, index))


def enum_elements(
    enum: descriptor_pb2.EnumDescriptorProto, name: str, path: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name, path
    for number, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, VALUE, number)


def message_elements(
    message: descriptor_pb2.DescriptorProto, name: str, path: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name, path
    synthetic = {field.oneof_index for field in message.field if field.proto3_optional}
    for number, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, FIELD, number)
    for number, oneof in enumerate(message.oneof_decl):
        if number not in synthetic:
            yield f"{name}.{oneof.name}", (*path, ONEOF, number)
    for number, enum in enumerate(message.enum_type):
        yield from enum_elements(enum, f"{name}.{enum.name}", (*path, MESSAGE_ENUM, number))
    for number, nested in enumerate(message.nested_type):
        yield from message_elements(nested, f"{name}.{nested.name}", (*path, NESTED, number))


def comments(file: descriptor_pb2.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {
        tuple(location.path): location.leading_comments.strip()
        for location in file.source_code_info.location
    }


def test_everything_in_the_contract_has_a_comment_that_is_a_sentence(
    descriptors: descriptor_pb2.FileDescriptorSet,
) -> None:
    counted = 0
    unexplained = []
    for file in descriptors.file:
        said = comments(file)
        for name, path in elements(file):
            counted += 1
            if not said.get(path, "").endswith("."):
                unexplained.append(f"{file.name}: {name}")
    assert unexplained == []
    assert counted > 150


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("_seconds", ("second", "Since")),
        ("_bytes", ("bytes",)),
        ("_ns", ("nanoseconds",)),
        ("_ms", ("milliseconds",)),
        ("width", ("pixels",)),
        ("height", ("pixels",)),
    ],
)
def test_comments_of_quantities_name_their_unit(
    descriptors: descriptor_pb2.FileDescriptorSet, suffix: str, words: tuple[str, ...]
) -> None:
    quantities = [
        (f"{file.name}: {name}", comments(file)[path])
        for file in descriptors.file
        for name, path in elements(file)
        if name.endswith(suffix)
    ]
    assert quantities
    assert [name for name, said in quantities if not any(word in said for word in words)] == []
