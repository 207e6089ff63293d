"""The committed protobuf modules are what `make protos` writes; the protocol keeps its style."""

import re
import shutil
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor

from conclave.protos import gateway_pb2, generation_pb2, worker_pb2

ROOT = Path(__file__).parent.parent
FILES = [gateway_pb2.DESCRIPTOR, generation_pb2.DESCRIPTOR, worker_pb2.DESCRIPTOR]


def test_generated_modules_are_fresh(tmp_path: Path) -> None:
    from grpc_tools import protoc

    source = tmp_path / "conclave" / "protos"
    source.mkdir(parents=True)
    for proto in (ROOT / "protos").glob("*.proto"):
        shutil.copy(proto, source)
    names = [str(path) for path in sorted(source.glob("*.proto"))]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"-I{tmp_path}", *outputs, *names]) == 0
    made = [path for path in source.iterdir() if path.suffix in (".py", ".pyi")]
    assert made
    for path in made:
        assert path.read_text() == (ROOT / "protos" / path.name).read_text(), "run `make protos`"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_style(file: FileDescriptor) -> None:
    assert file.package == "conclave.v1"
    for service in file.services_by_name.values():
        assert service.name.endswith("Service")
    for enum in file.enum_types_by_name.values():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert all(value.name.startswith(prefix) for value in enum.values)
        assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"


def test_sampling_scalars_tell_absent_from_zero() -> None:
    for field in generation_pb2.SamplingParams.DESCRIPTOR.fields:
        if not field.is_repeated and field.type != FieldDescriptor.TYPE_MESSAGE:
            assert field.has_presence, field.name
