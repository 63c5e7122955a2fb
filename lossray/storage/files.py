"""Bytes at relative paths under one root: a local folder, or an object store that fsspec knows.

A reader of either never sees a partial file. Locally a file is written under a temporary name, synced and
renamed. An object store has no atomic rename, but there an object appears only when its write is complete,
so the final key is written once. Names that start with "." are temporary or private and are never listed.
"""

import contextlib
import os
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lossray.errors import StoreError


class Files(Protocol):
    """What a store needs from the place where it lies. All paths are relative to the root, "/"-separated."""

    root: str

    def read(self, path: str) -> bytes:
        """The content of a file; FileNotFoundError where there is none."""

    def read_many(self, paths: list[str]) -> list[bytes]:
        """The contents of several files, in order; concurrently where a request has a latency."""

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a file in one step."""

    def names(self, folder: str) -> list[str]:
        """Sorted paths of all files below a folder; empty where the folder does not exist."""

    def exists(self, path: str) -> bool:
        """Whether there is a file at the path."""

    def size(self, path: str) -> int | None:
        """Bytes of the file at the path; None where there is none."""

    def delete(self, path: str) -> None:
        """Remove a file; nothing happens where there is none."""


class LocalFiles:
    """Files in a folder of this machine, or of a network file system that is mounted here."""

    def __init__(self, root: str):
        self.root = root

    def absolute(self, path: str) -> str:
        """The path that the operating system knows."""
        return os.path.join(self.root, path)

    def read(self, path: str) -> bytes:
        """See Files."""
        with open(self.absolute(path), "rb") as file:
            return file.read()

    def read_many(self, paths: list[str]) -> list[bytes]:
        """See Files."""
        return [self.read(path) for path in paths]

    def write(self, path: str, data: bytes) -> None:
        """See Files."""
        folder, name = os.path.split(self.absolute(path))
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{name}-{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, os.path.join(folder, name))
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(folder)

    def names(self, folder: str) -> list[str]:
        """See Files."""
        paths = []
        # os.walk needs no stat of the files, so one that is renamed or removed meanwhile does no harm.
        for here, folders, names in os.walk(self.absolute(folder), onerror=_raise_unless_missing):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = os.path.relpath(here, self.root).replace(os.sep, "/")
            prefix = "" if relative == "." else f"{relative}/"
            paths += [prefix + name for name in names if not name.startswith(".")]
        return sorted(paths)

    def exists(self, path: str) -> bool:
        """See Files."""
        return os.path.isfile(self.absolute(path))

    def size(self, path: str) -> int | None:
        """See Files."""
        return os.path.getsize(self.absolute(path)) if self.exists(path) else None

    def delete(self, path: str) -> None:
        """See Files."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.absolute(path))


class ObjectFiles:
    """Files behind an fsspec file system: s3://, gs://, memory:// and others that write an object whole."""

    def __init__(self, filesystem: Any, root: str):
        self.filesystem = filesystem
        self.root = root.rstrip("/")

    def read(self, path: str) -> bytes:
        """See Files."""
        return bytes(self.filesystem.cat_file(f"{self.root}/{path}"))

    def read_many(self, paths: list[str]) -> list[bytes]:
        """See Files."""
        if not paths:
            return []
        contents = self.filesystem.cat([f"{self.root}/{path}" for path in paths])
        return [bytes(contents[f"{self.root}/{path}"]) for path in paths]

    def write(self, path: str, data: bytes) -> None:
        """See Files."""
        self.filesystem.pipe_file(f"{self.root}/{path}", data)

    def names(self, folder: str) -> list[str]:
        """See Files."""
        # A bucket is listed by prefix, and "parts/runs" is also a prefix of "parts/runs-old".
        prefix = f"{self.root}/{folder}/" if folder else f"{self.root}/"
        try:
            full_paths = self.filesystem.find(prefix.rstrip("/"))
        except FileNotFoundError:
            return []
        relative = [path[len(self.root) + 1 :] for path in full_paths if path.startswith(prefix)]
        return sorted(path for path in relative if not _hidden(path))

    def exists(self, path: str) -> bool:
        """See Files."""
        return bool(self.filesystem.isfile(f"{self.root}/{path}"))

    def size(self, path: str) -> int | None:
        """See Files."""
        try:
            return int(self.filesystem.size(f"{self.root}/{path}"))
        except FileNotFoundError:
            return None

    def delete(self, path: str) -> None:
        """See Files."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(f"{self.root}/{path}")


def open_files(url: str) -> LocalFiles | ObjectFiles:
    """The files under a local path or a URI.

    Raises:
        StoreError: the URI's protocol is unknown or needs a package that is not installed.
    """
    try:
        # A cached listing would hide what other processes have written since.
        filesystem, root = fsspec.core.url_to_fs(os.path.expanduser(url), use_listings_cache=False)
    except (ImportError, ValueError, OSError) as error:
        raise StoreError(f"cannot open the store {url!r}: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalFiles(os.path.abspath(root))  # one name for one store, whatever ".." it was given with
    return ObjectFiles(filesystem, root)


def _sync_folder(folder: str) -> None:
    """Make a rename survive a power failure: the entry in the folder must reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    """Walking on after "permission denied" would make a store look empty, and its work would be redone."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def keyed(paths: Iterable[str]) -> dict[str, str]:
    """File paths by their name without folder and extension: {"parts/runs/ab12.parquet"} -> "ab12"."""
    return {path.rsplit("/", 1)[-1].rsplit(".", 1)[0]: path for path in paths}
