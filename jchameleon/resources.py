"""Where the files that ship beside the code lie: presets and demo adapters.

A wheel carries `configs/` inside the package; a source checkout keeps it at the top
level, one folder above.
"""

from pathlib import Path


def configs_dir() -> Path:
    """Return the folder of presets and demo adapters."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def demo_adapters_dir() -> Path:
    """Return the folder with one PEFT directory per demo adapter."""
    return configs_dir() / "demo" / "adapters"
