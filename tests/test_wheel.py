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
from smollm2 import smollm2_path

ROOT = Path(__file__).parent.parent
ADAPTER_FOLDERS = sorted(
    path.parent
    for path in (ROOT / "configs/demo/adapters").glob("*/adapter_config.json")
)
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
    assert len(ADAPTER_FOLDERS) == 3
    for folder in ADAPTER_FOLDERS:
        assert (folder / "adapter_config.json").is_file()
        weights = folder / "adapter_model.safetensors"
        assert weights.stat().st_size < MAX_ADAPTER_BYTES


GENERATE = """
import json, sys
from pathlib import Path
import jchameleon
from jchameleon import LLM, SamplingParams
from jchameleon.resources import configs_dir, demo_adapters

package = Path(jchameleon.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert configs_dir().parent == package, configs_dir()
options = {"max_running": 1, "max_batch_tokens": 64, "max_model_len": 128}
with LLM("smollm2-135m", adapters=demo_adapters(), **options) as llm:
    [output] = llm.generate(
        llm.chat_prompt("What is the capital of France?"),
        adapters="json",
        sampling=SamplingParams(max_tokens=48, temperature=0.0),
    )
print(json.dumps({"text": output.text, "adapters": sorted(demo_adapters())}))
"""


@pytest.mark.timeout(480)
def test_installed_wheel_generates_away_from_the_checkout(wheel, tmp_path):
    smollm2_path()  # the model is there, or the test says why it is skipped
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    # Byte code for all of jax would double the time; what runs is compiled on import.
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    run(*pip, wheel, cwd=tmp_path)
    result = json.loads(run(python, "-c", GENERATE, cwd=tmp_path).splitlines()[-1])
    assert "Paris" in json.loads(result["text"])["answer"]
    assert result["adapters"] == sorted(path.name for path in ADAPTER_FOLDERS)

    adapter = ADAPTER_FOLDERS[0]
    command = [venv / "bin" / "jchameleon", "adapters", "inspect", "--json", adapter]
    facts = json.loads(run(*command, cwd=tmp_path))
    assert facts["targets"] == ["q", "v"]
