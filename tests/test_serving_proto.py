"""The generated messages are those of the .proto files."""

import subprocess
import sys
from pathlib import Path

from jchameleon.serving import proto

ROOT = Path(proto.__file__).parent
SOURCES = sorted(ROOT.glob("jchameleon/v1/*.proto"))


def test_generated_messages_are_current(tmp_path):
    assert len(SOURCES) == 3
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT)),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"),
            *map(str, SOURCES),
        ],
        check=True,
    )
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*_pb2.py*")}
    kept = {path.relative_to(ROOT): path for path in ROOT.rglob("*_pb2.py*")}
    assert made.keys() == {one for one in kept if one.suffix in (".py", ".pyi")}
    for name, path in made.items():
        assert path.read_text("utf-8") == kept[name].read_text("utf-8"), (
            f"{name} is out of date; jchameleon/serving/proto/__init__.py says how to "
            "make it"
        )
