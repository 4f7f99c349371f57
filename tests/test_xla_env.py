"""What XLA reads from the environment: set in time, merged, never twice.

Each case is a process of its own. An empty plugin stands where a CUDA plugin would be;
XLA itself says which flags it took, and jaxlib which share of memory.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import jchameleon
from jchameleon.runtime.xla_env import merge_flags

ROOT = Path(jchameleon.__file__).parent.parent
FLAG = "--xla_disable_hlo_passes"
OURS = f"{FLAG}=rematerialization"
NAMES = ("XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

# Prints the environment, what XLA compiles with and what a GPU would be opened with.
REPORT = """
import json, os, sys
env = {name: os.environ[name] for name in sys.argv[1:] if name in os.environ}
from jaxlib import xla_client
options = xla_client.CompileOptions().SerializeAsString()
print(json.dumps({
    "env": env,
    "skipped": [p for p in ("algsimp", "dce", "rematerialization")
                if p.encode() in options],
    "gpu": xla_client.generate_pjrt_gpu_plugin_options(),
}))
"""


@pytest.fixture
def report(tmp_path):
    """Run code in a process with a plugin for CUDA; return what `REPORT` prints."""

    def run(code, *, plugin=True, **env):
        if plugin:
            folder = tmp_path / "jax_plugins" / "xla_cuda12"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text("def initialize():\n    pass\n")
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code) + REPORT, *NAMES],
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k not in NAMES}
            | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "", **env},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


FRESH = "from jchameleon.runtime.xla_env import prepare; prepare()\n"


def test_fresh_process_sets_share_of_memory_and_flag(report):
    found, err = report(
        "import sys, jchameleon\n"
        "assert 'jax' not in sys.modules\n"
        "from jchameleon import LLM\n"
        "from jchameleon import LLM\n"
        "from jchameleon.runtime.xla_env import prepare\n"
        "prepare()\n"
    )
    assert found["env"] == {"XLA_FLAGS": OURS, "XLA_CLIENT_MEM_FRACTION": "0.92"}
    assert found["skipped"] == ["rematerialization"]
    assert found["gpu"]["memory_fraction"] == 0.92
    assert "devices already" not in err


def test_flags_are_set_before_jax_is_imported(report):
    report(
        """
        import os, sys
        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name == "jax":
                    assert "rematerialization" in os.environ["XLA_FLAGS"]
        sys.meta_path.insert(0, Watch())
        from jchameleon import LLM
        assert "jax" in sys.modules
        """
    )


def test_flags_of_the_user_are_kept_and_the_list_extended(report):
    own = f"--xla_cpu_enable_fast_math=false {FLAG}=dce,algsimp"
    found, _ = report(FRESH, XLA_FLAGS=own)
    assert found["env"]["XLA_FLAGS"].startswith("--xla_cpu_enable_fast_math=false ")
    assert found["skipped"] == ["algsimp", "dce", "rematerialization"]


@pytest.mark.parametrize("name", NAMES[1:])
def test_share_of_memory_of_the_user_is_kept(report, name):
    # jaxlib raises where both names are set.
    found, _ = report(FRESH, **{name: "0.5"})
    assert found["gpu"]["memory_fraction"] == 0.5
    assert set(found["env"]) == {"XLA_FLAGS", name}


def test_jax_imported_before_is_early_enough(report):
    found, err = report("import jax, jax.numpy\n" + FRESH)
    assert found["skipped"] == ["rematerialization"]
    assert found["gpu"]["memory_fraction"] == 0.92
    assert "devices already" not in err


def test_devices_looked_for_before_warns_once_and_changes_nothing(report):
    late = "import jax; jax.devices('cpu')\n" + FRESH
    late += FRESH
    found, err = report(late)
    assert found["env"] == {}
    assert err.count("devices already") == 1
    assert f"'{OURS}'" in err
    assert "XLA_CLIENT_MEM_FRACTION='0.92'" in err
    _, err = report(late, XLA_FLAGS=OURS, XLA_CLIENT_MEM_FRACTION="0.9")
    assert "devices already" not in err


def test_file_of_flags_is_left_alone_with_a_warning(report, tmp_path):
    (tmp_path / "flags").write_text(f"{FLAG}=dce\n")
    path = str(tmp_path / "flags")
    found, err = report(FRESH, XLA_FLAGS=path)
    assert found["env"]["XLA_FLAGS"] == path
    assert found["skipped"] == ["dce"]
    assert f"add {FLAG} there" in err


@pytest.mark.parametrize("case", [{"plugin": False}, {"JAX_PLATFORMS": "cpu"}])
def test_process_without_gpu_is_left_alone(report, case):
    # Flags are part of the key of jax's compilation cache.
    found, _ = report(FRESH, **case)
    assert found["env"] == {}


@pytest.mark.parametrize(
    ("flags", "merged"),
    [
        ("", OURS),
        (f"{OURS} --a=b", f"{OURS} --a=b"),
        (f"{FLAG}=x,rematerialization", f"{FLAG}=x,rematerialization"),
        (f'{FLAG}="rematerialization" --a', f'{FLAG}="rematerialization" --a'),
        (f"--a='b  c' {FLAG}=x", f"--a='b  c' {FLAG}=x {OURS}"),
        (f"{FLAG}=rematerialization2", f"{FLAG}=rematerialization2 {OURS}"),
        (
            f"--no{FLAG[2:]}=rematerialization",
            f"--no{FLAG[2:]}=rematerialization {OURS}",
        ),
    ],
)
def test_merged_flags_keep_every_other_character(flags, merged):
    assert merge_flags(flags) == merged
    assert merge_flags(merged) == merged
