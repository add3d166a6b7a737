"""Where files lie: on this machine, or at an address that pyarrow or fsspec can open (``s3://``, ``gs://``, ``fsspec+NAME://``...).

Servers go away for a while: whoever reads or writes asks again until :data:`WAIT_S` are over. What a server says for good (no such bucket,
no permission) is said to the user at the start, by :meth:`Store.probe`.
"""

from __future__ import annotations

import errno
import io
import posixpath
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
from safetensors import SafetensorError

from didr_core.config import bundled, locate, redacted
from didr_core.config.files import expanded
from didr_core.config.passwords import HIDDEN
from didr_core.types import DIDRError

T = TypeVar("T")
Version = tuple[int, int]
"""Size in bytes, and when it was last changed, in ns."""
WAIT_S = 300.0
"""How long a server that does not answer is asked again, where nothing can go on without it."""
LEAST_FREE = 64 * 2**20
GCS_RETRY = "retry_limit_seconds"
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role; AWS_DEFAULT_REGION; for a server that is not "
    "Amazon's AWS_ENDPOINT_URL, or s3://bucket/path?endpoint_override=HOST:PORT&scheme=http",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}
"""By scheme: where pyarrow looks for them."""


def is_address(path: str) -> bool:
    """Whether ``path`` is an address of some storage rather than a path of this machine or the bundled world's."""
    return "://" in path and not bundled(path)


def below(address: str, name: str) -> str:
    """The address of ``name`` in the folder ``address``, options (``?region=...``) kept."""
    folder, mark, options = address.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


@lru_cache(64)
def open_filesystem(path: str, key: str = "prompts") -> tuple[Any, str]:
    """The file system that ``path`` (an address or a local path) lies in, and its path there.

    Raises:
        DIDRError: an address of an unknown kind, or one that cannot be opened.
    """
    if not is_address(path):
        return pafs.LocalFileSystem(), str(locate(path))
    address = path.replace(f"{HIDDEN}@", "")  # as config.yaml has it: the key is the environment's, then
    if address.startswith(("gs://", "gcs://")) and GCS_RETRY not in address:  # else it tries for a quarter of an hour
        address += f"{'&' if '?' in address else '?'}{GCS_RETRY}=10"
    try:
        return pafs.FileSystem.from_uri(address)  # type: ignore[no-any-return]
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise unusable(key, path, error) from error


def unusable(key: str, path: str, error: Exception) -> DIDRError:
    """What is said of an address that cannot be opened, read or written."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    scheme = path.partition("://")[0]
    hint = "Expected s3, gs, abfs, hdfs, hf, file, or fsspec+NAME for any other file system of fsspec"
    if scheme in CREDENTIALS and "Unrecognized" not in reason:
        hint = f"Check the bucket, and the credentials: {CREDENTIALS[scheme]}"
    return DIDRError(redacted(f"{key}={path!r}: this storage cannot be used ({reason[:300]}). {hint}."))


@contextmanager
def reached(key: str, path: str) -> Iterator[None]:
    """Inside, ``path`` is asked for; a DIDRError where it is an address whose server refuses or does not answer."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if not is_address(path):
            raise
        raise unusable(key, path, error) from error


def patiently(filesystem: Any, path: str, read: Callable[[], T]) -> T:
    """``read()`` of the file ``path``, asked again while its server does not answer.

    Raises:
        OSError: it cannot be read though the server answers; or :data:`WAIT_S` are over.
    """
    late, again = time.monotonic() + WAIT_S, False
    while True:
        try:
            return read()
        except OSError:
            if again or isinstance(filesystem, pafs.LocalFileSystem) or time.monotonic() > late:
                raise
            with suppress(OSError):
                again = filesystem.get_file_info(path).type is not None  # it answers: once more, then it is the file
            time.sleep(0 if again else 1)


class Store:
    """The files in the folder at an address, by their names relative to it."""

    def __init__(self, address: str, key: str = "--output") -> None:
        self.address, self.key = address, key
        self.filesystem, self.root = open_filesystem(address, key)
        self.root = self.root.rstrip("/")

    def files(self, folder: str = "") -> dict[str, Version]:
        """All files in ``folder`` and below it; none where there is no such folder."""
        selector = pafs.FileSelector(self._at(folder), recursive=True, allow_not_found=True)
        found = (i for i in self.filesystem.get_file_info(selector) if i.type == pafs.FileType.File)
        return {posixpath.relpath(i.path.strip("/"), self.root.strip("/")): (i.size, i.mtime_ns or 0) for i in found}

    def version(self, name: str) -> Version:
        """Of one file; ``(-1, 0)`` where there is none."""
        info = self.filesystem.get_file_info(self._at(name))
        return (info.size, info.mtime_ns or 0) if info.type == pafs.FileType.File else (-1, 0)

    def read(self, name: str) -> bytes | None:
        """What is in a small file; None where there is none."""
        try:
            with self.filesystem.open_input_stream(self._at(name), compression=None) as file:
                return file.read()  # type: ignore[no-any-return]
        except FileNotFoundError:
            return None

    def put(self, name: str, source: IO[bytes] | bytes) -> None:
        """Write a file; on object stores it is there whole or not at all."""
        source = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            out = self.filesystem.open_output_stream(self._at(name), compression=None)
        except FileNotFoundError:  # a file system with real folders
            self.filesystem.create_dir(posixpath.dirname(self._at(name)), recursive=True)
            out = self.filesystem.open_output_stream(self._at(name), compression=None)
        with out:
            shutil.copyfileobj(source, out, 2**23)

    def get(self, name: str, path: Path) -> None:
        """Bring a file here, to ``path``."""
        with self.filesystem.open_input_stream(self._at(name), compression=None) as file, path.open("wb") as out:
            shutil.copyfileobj(file, out, 2**23)

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with what is in it; nothing where it is gone."""
        with suppress(FileNotFoundError):
            if self.filesystem.get_file_info(self._at(name)).type == pafs.FileType.Directory:
                self.filesystem.delete_dir(self._at(name))
            else:
                self.filesystem.delete_file(self._at(name))

    def probe(self) -> None:
        """Write and remove a small file.

        Raises:
            DIDRError: that does not work; says why, and where credentials are looked for.
        """
        with reached(self.key, self.address):
            self.put(".didr-probe", b"didr")
            self.delete(".didr-probe")

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


def local_folder(key: str, path: str) -> Path:
    """``path`` as an absolute folder.

    Raises:
        DIDRError: an address like ``s3://``; what lies there is read and renamed in place, which needs a (shared) file system.
    """
    if "://" in path:
        raise DIDRError(
            f"{key}={path!r}: expected a folder on a file system that all nodes share; mount the bucket and give that path. "
            "Addresses are for data.prompts, data.heldout, output and --output of `didr align`, and --out of `didr evaluate`."
        )
    return expanded(path).resolve()


@contextmanager
def disk(key: str, path: Path, needed: int = 0) -> Iterator[None]:
    """Turn errors of writing to ``path``, of ``needed`` bytes, into words."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        inner = re.search(r"os error (\d+)", str(error))  # of safetensors, whose error is no OSError
        if (int(inner[1]) if inner else getattr(error, "errno", 0)) in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
            room = f"about {needed:,} bytes needed, {free:,}" if needed else f"{free:,} bytes"
            raise DIDRError(
                f"{key} {path}: the disk is full: {room} free. Free some space; `--resume` continues the run."
            ) from error
        raise DIDRError(
            f"{key} {path}: cannot write ({getattr(error, 'strerror', '') or error}). Check the path and its permissions."
        ) from error


def room(key: str, path: Path, needed: int = LEAST_FREE) -> None:
    """Whether the disk where ``path`` is, or will be made, has ``needed`` bytes.

    Raises:
        DIDRError: it has not, or a file is in the way; names ``key``, path, needed and free.
    """
    folder = next(p for p in (path, *path.parents) if p.exists())
    if not folder.is_dir():
        raise DIDRError(f"{key}={str(path)!r}: {folder} is a file. Expected a folder.")
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DIDRError(
            f"{key}={str(path)!r}: {free:,} bytes free on its disk; a run needs at least {needed:,}. Free some, or choose another folder."
        )
