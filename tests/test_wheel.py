"""The wheel is whole: installed where nothing else is, it generates.

The environment is a fresh one and the dependencies are installed into it as a user's
would be, which takes about half a minute; nothing of this checkout is on its path.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ADAPTERS = ROOT / "configs" / "demo" / "adapters"
MAX_ADAPTER_BYTES = 2_000_000


def run(*command, cwd):
    """Run without what this process's environment says about Python and jax."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the path of a wheel that is built from an sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
    run(*build, ROOT, cwd=folder)
    assert len(list(folder.glob("jchameleon-*.tar.gz"))) == 1
    [path] = folder.glob("jchameleon-*.whl")
    return path


def test_wheel_holds_the_package_its_configs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jchameleon"}
    assert "jchameleon/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for path in [*(ROOT / "configs").rglob("*"), *(ROOT / "jchameleon").rglob("*.py")]:
        if path.is_file():
            below = path.relative_to(ROOT).as_posix().removeprefix("jchameleon/")
            assert f"jchameleon/{below}" in names


def test_demo_adapters_are_small_peft_directories():
    folders = sorted(ADAPTERS.iterdir())
    assert len(folders) == 3
    for folder in folders:
        assert (folder / "adapter_config.json").is_file()
        weights = folder / "adapter_model.safetensors"
        assert weights.stat().st_size < MAX_ADAPTER_BYTES


GENERATE = """
import json, sys
from pathlib import Path
import jchameleon
from jchameleon import LLM, SamplingParams
from jchameleon.resources import configs_dir, demo_adapters_dir

package = Path(jchameleon.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert configs_dir().parent == package, configs_dir()
with LLM("tiny", max_running=2, max_batch_tokens=64, max_model_len=64) as llm:
    [output] = llm.generate(
        ["Hello"], sampling=SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    )
print(json.dumps({
    "tokens": len(output.token_ids),
    "adapters": sorted(path.name for path in demo_adapters_dir().iterdir()),
}))
"""


@pytest.mark.timeout(480)
def test_installed_wheel_generates_away_from_the_checkout(wheel, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    # Byte code for all of jax would double the time; what runs is compiled on import.
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    run(*pip, wheel, cwd=tmp_path)
    result = json.loads(run(python, "-c", GENERATE, cwd=tmp_path).splitlines()[-1])
    assert result["tokens"] == 4
    assert result["adapters"] == sorted(path.name for path in ADAPTERS.iterdir())

    adapter = ADAPTERS / result["adapters"][0]
    command = [venv / "bin" / "jchameleon", "adapters", "inspect", "--json", adapter]
    facts = json.loads(run(*command, cwd=tmp_path))
    assert facts["targets"] == ["q", "v"]
