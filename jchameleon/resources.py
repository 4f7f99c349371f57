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


def demo_adapters() -> dict[str, Path]:
    """Return the PEFT directories of the demo adapters by name, sorted."""
    configs = (configs_dir() / "demo" / "adapters").glob("*/adapter_config.json")
    return {path.parent.name: path.parent for path in sorted(configs)}
