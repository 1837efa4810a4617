"""Files out of packages, with Python's own library only: Debian's .deb, wheels, and Qt's .rcc archives inside them."""

from __future__ import annotations

import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from clora.errors import CloraError

_RCC_COMPRESSED, _RCC_FOLDER, _RCC_ZSTD = 1, 2, 4


def read_package(package: Path, paths: Iterable[str]) -> dict[str, bytes]:
    """Reads files of a package.

    Args:
        package: a ``.deb`` or ``.whl`` file.
        paths: the files, without a slash at the beginning. ``a.rcc/b`` is the file b in the archive a.rcc.

    Returns:
        Path to content.

    Raises:
        CloraError: the package cannot be read, or does not hold one of the files.
    """
    paths = list(paths)
    members = {_outer(path) for path in paths}
    try:
        read = _read_wheel if package.suffix == ".whl" else _read_deb
        found = read(package, members)
        archives = {name: read_rcc(data) for name, data in found.items() if name.endswith(".rcc")}
    except (OSError, ValueError, EOFError, struct.error, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise CloraError(f"{package} cannot be read ({error}); download it again") from error
    contents = {}
    for path in paths:
        outer = _outer(path)
        content = archives.get(outer, {}).get(path[len(outer) + 1 :]) if outer != path else found.get(path)
        if content is None:
            raise CloraError(f"expected {path!r} in {package}, found none; take the version that docs/studio.md names")
        contents[path] = content
    return contents


def _outer(path: str) -> str:
    """Returns the path of the archive that holds a file, or the file's own path if none does."""
    head, archive, _ = path.partition(".rcc/")
    return head + ".rcc" if archive else path


def _read_wheel(package: Path, members: set[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(package) as archive:
        return {name: archive.read(name) for name in members.intersection(archive.namelist())}


def _read_deb(package: Path, members: set[str]) -> dict[str, bytes]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(_data_of_deb(package.read_bytes())), mode="r:*") as archive:
        for entry in archive:
            name = entry.name.removeprefix("./")
            if name in members and entry.isfile():
                file = archive.extractfile(entry)
                assert file is not None
                found[name] = file.read()
    return found


def _data_of_deb(content: bytes) -> bytes:
    """Returns the tar file of a .deb, which is an ar archive: 60 bytes of header, then the file, for each."""
    if content[:8] != b"!<arch>\n":
        raise ValueError("not a Debian package")
    position = 8
    while position + 60 <= len(content):
        header = content[position : position + 60]
        size = int(header[48:58])
        if header[:16].startswith(b"data.tar"):
            return content[position + 60 : position + 60 + size]
        position += 60 + size + size % 2  # files begin at even places
    raise ValueError("no data.tar in it")


def read_rcc(content: bytes) -> dict[str, bytes]:
    """Reads all files of a Qt resource archive (``rcc --binary``, format versions 1 to 3).

    Raises:
        ValueError: it is no such archive, or a file in it is compressed with zstd.
    """
    if content[:4] != b"qres":
        raise ValueError("not a Qt resource archive")
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    entry_size = 22 if version >= 2 else 14  # from version 2 on with the time of the last change
    files: dict[str, bytes] = {}
    folders = [(0, "")]
    while folders:
        index, prefix = folders.pop()
        _, _, count, first = struct.unpack_from(">IHII", content, tree + index * entry_size)
        for child in range(first, first + count):
            place = tree + child * entry_size
            name_at, flags = struct.unpack_from(">IH", content, place)
            path = prefix + _rcc_name(content, names + name_at)
            if flags & _RCC_FOLDER:
                folders.append((child, path + "/"))
            else:
                (data_at,) = struct.unpack_from(">I", content, place + 10)
                files[path] = _rcc_data(content, data + data_at, flags)
    return files


def _rcc_name(content: bytes, place: int) -> str:
    """A name is its length, a hash, and UTF-16."""
    (length,) = struct.unpack_from(">H", content, place)
    return content[place + 6 : place + 6 + 2 * length].decode("utf-16-be")


def _rcc_data(content: bytes, place: int, flags: int) -> bytes:
    (size,) = struct.unpack_from(">I", content, place)
    data = content[place + 4 : place + 4 + size]
    if flags & _RCC_ZSTD:
        raise ValueError("compressed with zstd, which is not supported")
    if not flags & _RCC_COMPRESSED:
        return data
    try:
        return zlib.decompress(data[4:])  # after the size of the result
    except zlib.error as error:
        raise ValueError(error) from error
