"""Where adapters may lie: below one folder, whatever a caller or a link says."""

import os
import re
import stat
from pathlib import Path

from jchameleon.errors import AdapterError, ConfigError
from jchameleon.serving.status import invalid

ADAPTER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_PATH_CHARS = 1024
FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_adapter_id(adapter_id: str) -> None:
    """Raise INVALID_ARGUMENT unless an id is a plain name, no path."""
    if not ADAPTER_ID.fullmatch(adapter_id):
        raise invalid(
            "adapter_id",
            f"adapter_id={adapter_id[:40]!r} must have 1 to 128 of A-Z a-z 0-9 . _ -, "
            "and a letter or digit first",
        )


class AdapterRoot:
    """A folder that all adapters of a server lie below."""

    def __init__(self, root: str, *, max_bytes: int) -> None:
        """Resolve the folder once; links to other places count from here on.

        Args:
          max_bytes: of an adapter's weights file.

        Raises:
          ConfigError: there is no such folder.
        """
        self._root = os.path.realpath(root)
        self._max_bytes = max_bytes
        if not os.path.isdir(self._root):
            raise ConfigError(f"adapters.root={root!r} must be a folder")

    def resolve(self, source_path: str) -> Path:
        """Return the folder of an adapter, links resolved; nothing is opened.

        Raises:
          StatusError: INVALID_ARGUMENT, it is no path below the root.
          AdapterError: it is no folder with an adapter's files in it.
        """
        parts = source_path.split("/")
        if not 0 < len(source_path) <= MAX_PATH_CHARS or "\0" in source_path:
            raise _refused(source_path, f"have 1 to {MAX_PATH_CHARS} characters")
        if source_path.startswith("/") or {"", ".", ".."} & set(parts):
            raise _refused(source_path, "be a plain relative path")
        folder = os.path.realpath(os.path.join(self._root, source_path))
        if not self._holds(folder):
            raise _refused(source_path, "lead below the adapter root")
        if not os.path.isdir(folder):
            raise AdapterError(f"adapter {source_path!r}: there is no such directory")
        for name in FILES:
            self._check_file(source_path, os.path.join(folder, name))
        return Path(folder)

    def relative(self, folder: str) -> str:
        """Return a resolved folder as a path below the root."""
        return os.path.relpath(folder, self._root)

    def _holds(self, path: str) -> bool:
        return os.path.commonpath((self._root, path)) == self._root

    def _check_file(self, source_path: str, path: str) -> None:
        """Refuse a file that a link leads out of the root, and one that is too large.

        A missing one is for the reader to complain of.
        """
        if not os.path.lexists(path):
            return
        name = os.path.basename(path)
        real = os.path.realpath(path)
        if not self._holds(real):
            raise _refused(source_path, f"not link {name} to outside the adapter root")
        try:
            status = os.stat(real)
        except OSError as error:
            raise AdapterError(f"adapter {source_path!r}: {name}: {error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(
                f"adapter {source_path!r}: {name} must be a regular file"
            )
        if status.st_size > self._max_bytes:
            raise AdapterError(
                f"adapter {source_path!r}: {name} has {status.st_size} bytes, "
                f"max_adapter_bytes={self._max_bytes}"
            )


def _refused(source_path: str, rule: str) -> Exception:
    return invalid("source_path", f"source_path={source_path[:80]!r} must {rule}")
