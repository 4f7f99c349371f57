"""Who may import whom, and what must work without jax.

Imports are read from the source, so one inside a function counts as much as one at the
top.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jchameleon

ROOT = Path(jchameleon.__file__).parent

# The part of the package that a module belongs to: the longest prefix counts.
PARTS = (
    "config",
    "errors",
    "families",
    "resources",
    "sampling",
    "lora",
    "pallas",
    "models",
    "runtime",
    "runtime.policy",
    "workload",
    "sim",
    "serving",
    "serving.proto",
    "client",
    "batch",
    "outputs",
    "requests",
    "lifecycle",
    "llm",
    "cli",
    "__init__",
    "__main__",
)

# What each part may import besides itself: parts, or single modules of them. Every part
# may also import LEAVES.
LEAVES = {"errors", "resources"}
FRONT_DOORS = {"lifecycle", "llm", "cli", "__init__", "__main__"}
MAY_IMPORT = {
    "errors": set(),
    "resources": set(),
    "families": {"config"},  # for annotations
    "config": {"families"},
    "sampling": set(),
    "lora": {"config"},
    # Kernels read where an adapter's elements lie; nothing else of lora.
    "pallas": {"config", "lora.layout"},
    "models": {"config", "families", "pallas", "lora"},
    "runtime.policy": {"config"},
    "runtime": {"config", "sampling", "models", "lora", "pallas", "runtime.policy"},
    "workload": set(),
    # How many pages an adapter takes, and what else takes memory: arithmetic alone.
    "sim": {
        "config",
        "runtime.policy",
        "runtime.memory",
        "runtime.shapes",
        "runtime.xla_env",
        "workload",
        "lora.layout",
        "models.params",
    },
    "serving": {
        "serving.proto",
        "config",
        "sampling",
        "outputs",
        "runtime",
        "requests",
        "llm",
    },
    "serving.proto": set(),
    "client": {"serving.proto", "workload"},
    # `requests` and `llm` for annotations.
    "batch": {
        "config",
        "sampling",
        "models.tokenizer",
        "outputs",
        "runtime",
        "requests",
        "llm",
    },
    "outputs": {"runtime.outbox", "runtime.policy"},
    "requests": {"outputs", "sampling", "models", "runtime"},
    "lifecycle": set(PARTS) - FRONT_DOORS,
    "llm": set(PARTS) - FRONT_DOORS | {"lifecycle"},
    "cli": set(PARTS) - {"__main__"},
    "__init__": set(PARTS) - {"cli", "__main__"},
    "__main__": {"cli"},
}

# Policies, the simulator and the readers of files must run, and start fast, where jax
# is not installed or not wanted.
WITHOUT_JAX = (
    "__init__",
    "config",
    "errors",
    "families",
    "resources",
    "sampling",
    "outputs",
    "batch",
    "cli",
    "client",
    "lora",
    "models.tokenizer",
    "models.chat",
    "models.embedded",
    "models.hf",
    "models.hf_config",
    "models.gguf",
    "models.describe",
    "models.export",
    "models.loader",
    "runtime.memory",
    "runtime.output",
    "runtime.policy",
    "runtime.shapes",
    "runtime.xla_env",
    "workload",
    "sim",
)
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}

# The one module that may know Pallas' GPU dialects and jax versions.
PALLAS_DIALECTS = "jax.experimental.pallas"
MAY_IMPORT_PALLAS = "pallas"


def module_name(path: Path) -> str:
    """Return the name below the package: `runtime.policy.pool`, `lora.__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def part_of(name: str) -> str:
    """Return the part that a module belongs to."""
    parts = [part for part in PARTS if is_in(name, part)]
    assert parts, f"{name} belongs to no part; add one to the table"
    return max(parts, key=len)


def imports_of(path: Path) -> set[str]:
    """Return absolute names of all that a file imports, `from` names included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports_of(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    found = set()
    for name in imports_of(path):
        if not is_in(name, "jchameleon"):
            continue
        below = name.removeprefix("jchameleon").removeprefix(".").split(".")
        # `from a.b import c`: c is a module, or a name in module a.b.
        while below and not is_module(below):
            below = below[:-1]
        found.add(".".join(below) or "__init__")
    return found


def is_module(below: list[str]) -> bool:
    path = ROOT.joinpath(*below)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_module_imports_only_what_its_part_may(name):
    part = part_of(name)
    allowed = {part} | LEAVES | MAY_IMPORT[part]
    wrong = {
        other
        for other in own_imports_of(FILES[name])
        # `from jchameleon import __version__` is the package's own front.
        if other != "__init__" and not {other, part_of(other)} & allowed
    }
    assert not wrong, f"{name} ({part}) must not import {sorted(wrong)}"


def test_tables_name_every_part_and_only_existing_ones_are_required():
    assert set(MAY_IMPORT) == set(PARTS)
    for part in PARTS:
        assert any(is_in(name, part) for name in FILES), f"{part} is gone"


def without_jax() -> list[str]:
    return [n for n in FILES if any(is_in(n, part) for part in WITHOUT_JAX)]


@pytest.mark.parametrize("name", without_jax())
def test_module_without_jax_names_no_jax_package(name):
    used = {module.partition(".")[0] for module in imports_of(FILES[name])}
    assert not used & JAX_PACKAGES


def test_modules_without_jax_do_not_load_it_through_others():
    modules = [
        ".".join(["jchameleon", *name.split(".")]).removesuffix(".__init__")
        for name in without_jax()
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = {JAX_PACKAGES!r} & set(sys.modules)\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_of_the_package_loads_next_to_nothing():
    code = (
        "import sys, jchameleon\n"
        "heavy = {'jax', 'numpy', 'tokenizers', 'gguf', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from jchameleon import SamplingParams, errors\n"
        "assert 'jax' not in sys.modules and issubclass(errors.ConfigError, ValueError)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_kernel_folder_imports_pallas():
    users = {
        name
        for name, path in FILES.items()
        if any(is_in(module, PALLAS_DIALECTS) for module in imports_of(path))
    }
    assert {part_of(name) for name in users} <= {MAY_IMPORT_PALLAS}


def test_every_imported_package_is_a_declared_dependency():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))
    declared = {
        re.match(r"[\w-]+", line)[0].replace("-", "_").lower()
        for line in project["project"]["dependencies"]
    }
    used = {
        module.partition(".")[0]
        for path in FILES.values()
        for module in imports_of(path)
    }
    used -= {*sys.stdlib_module_names, "jchameleon"}
    # Where the name of the package is another: grpcio, and protobuf with the messages
    # of googleapis-common-protos.
    names = {
        "grpc": "grpcio",
        "grpc_health": "grpcio_health_checking",
        "grpc_reflection": "grpcio_reflection",
        "google": "protobuf",
    }
    used = {names.get(one, one) for one in used}
    assert used
    assert used <= declared | {"orbax"}


def test_public_names_are_there():
    assert jchameleon.__version__ == "0.1.0"
    assert set(jchameleon.__all__) <= set(dir(jchameleon))
    for name in jchameleon.__all__:
        assert getattr(jchameleon, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = jchameleon.nonsense
