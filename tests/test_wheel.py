"""The wheel is whole: installed where nothing else is, it does what the README says.

The environment is a fresh one and the dependencies are installed into it as a user's
would be, which takes about half a minute; nothing of this checkout is on its path.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
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


WHERE = """
import json, sys
from pathlib import Path
import jchameleon
from jchameleon.resources import configs_dir, demo_adapters

package = Path(jchameleon.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert configs_dir().parent == package, configs_dir()
print(json.dumps(sorted(demo_adapters())))
"""


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    """Return the programs of an environment that has the wheel and what it asks for."""
    smollm2_path()  # the model is there, or the test says why it is skipped
    folder = tmp_path_factory.mktemp("newcomer")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    programs = folder / "venv" / "bin"
    # Byte code for all of jax would double the time; what runs is compiled on import.
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    run(*pip, wheel, cwd=folder)
    return programs


@pytest.mark.timeout(480)
def test_installed_wheel_brings_its_configs_and_adapters(bin_folder, tmp_path):
    found = json.loads(run(bin_folder / "python", "-c", WHERE, cwd=tmp_path))
    assert found == sorted(path.name for path in ADAPTER_FOLDERS)

    adapter = ADAPTER_FOLDERS[0]
    command = [bin_folder / "jchameleon", "adapters", "inspect", "--json", adapter]
    facts = json.loads(run(*command, cwd=tmp_path))
    assert facts["targets"] == ["q", "v"]


# What the README asks for in a checkout, where other tests and .ci/run do it.
IN_A_CHECKOUT = ("make ", "pip install ", ".venv-test/bin/python tools/")


def readme_steps():
    """Return the README's blocks and commands in order, as (language, text)."""
    text = (ROOT / "README.md").read_text("utf-8")
    pattern = r"^```(\w+)\n(.*?)^```$|^((?: {4}[^\n]*\n)+)"
    steps = []
    for fence in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        language, block, indented = fence.groups()
        if language in ("python", "json"):
            steps.append((language, block))
        elif indented is not None:
            lines = textwrap.dedent(indented).replace("\\\n", " ").splitlines()
            commands = [line.partition("  #")[0].strip() for line in lines]
            steps += [("bash", command) for command in commands if command]
    return steps


@pytest.mark.timeout(900)
def test_newcomer_follows_the_readme_line_by_line(bin_folder, tmp_path):
    """Every example, as it stands, in an empty folder with an adapter of one's own.

    Its lines of JSON are the requests of its batch.
    """
    shutil.copytree(ADAPTER_FOLDERS[0], tmp_path / "path" / "to" / "peft_dir")
    session = []
    for language, text in readme_steps():
        if language == "python":
            session.append(text)
        elif language == "json":
            (tmp_path / "requests.jsonl").write_text(text, encoding="utf-8")
        elif not text.startswith(IN_A_CHECKOUT):
            assert text.startswith("jchameleon "), f"the README asks for {text!r}"
            command = f'PATH="{bin_folder}:$PATH"; {text}'
            run("bash", "-ec", command, cwd=tmp_path)
    # One session: what a block imports or makes is there in the next.
    assert len(session) >= 4
    with demo_server(bin_folder, tmp_path):
        run(bin_folder / "python", "-c", "\n".join(session), cwd=tmp_path)


@contextlib.contextmanager
def demo_server(programs, folder):
    """Serve as `make serve-demo` does, at the port that the README names."""
    where = "from jchameleon.resources import configs_dir; print(configs_dir())"
    configs = Path(run(programs / "python", "-c", where, cwd=folder).strip())
    command = [programs / "jchameleon", "serve", configs / "serve-demo.toml"]
    server = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    with server:
        try:
            for line in server.stderr:
                if " ready " in line:
                    break
            else:
                raise AssertionError("the server ended before it was ready")
            yield
        finally:
            server.terminate()
            server.stderr.read()  # a full pipe would hold up its end
        assert server.wait(60) == 0
