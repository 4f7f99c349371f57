"""Adapter directories that take as long to read as a test wants."""

import os
from pathlib import Path

from jchameleon.config import ModelConfig
from jchameleon.lora.adapter import HostAdapter
from jchameleon.lora.peft import load_peft_adapter

MODEL = ModelConfig.preset("tiny")
GATE = "gate"


def close_gate(path: Path) -> None:
    """Make `read_adapter` wait at this directory until `open_gate`.

    The gate is a named pipe: reading it sleeps in the kernel as reading a slow disk
    does. The weights cannot be one, as our reader refuses what is no regular file.
    """
    os.mkfifo(path / GATE)


def open_gate(path: Path) -> None:
    """Wait until somebody reads this directory, then let all go on that wait there."""
    with open(path / GATE, "wb") as gate:
        gate.write(bytes(64))
        (path / GATE).unlink()


def read_adapter(path: str) -> HostAdapter:
    """Read a PEFT directory of the tiny model, after its gate if it has one."""
    gate = Path(path) / GATE
    if gate.exists():
        with open(gate, "rb", buffering=0) as pipe:
            pipe.read(1)
    return load_peft_adapter(path, MODEL, max_rank=64)
