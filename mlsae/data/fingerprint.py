"""The fingerprint of a local file or folder: the SHA-256 of the names and sizes of its files, and
of samples of their content.

Names are relative to the folder; hidden files and .md files do not count. Of a folder with more
than 64 files, 64 spread evenly are sampled; of a file above 1 MiB, 16 blocks of 64 KiB spread
evenly from its start to its end, of a smaller one everything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

_FILES, _BLOCKS, _BLOCK_BYTES = 64, 16, 2**16


def fingerprint(path: Path) -> str:
    """The fingerprint of a file or folder, as above."""
    if path.is_file():
        files = {path.name: path}
    else:
        relative = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
        files = {
            name.as_posix(): file
            for name, file in sorted(relative.items())
            if name.suffix != ".md" and not any(part.startswith(".") for part in name.parts)
        }
    sampled = _spread(len(files), _FILES)
    digest = hashlib.sha256()
    for i, (name, file) in enumerate(files.items()):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        if i in sampled:
            _add_samples(digest, file, size)
    return digest.hexdigest()


def _add_samples(digest: Any, path: Path, size: int) -> None:
    with path.open("rb") as file:
        if size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
            return
        for start in sorted(_spread(size - _BLOCK_BYTES + 1, _BLOCKS)):
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))


def _spread(n: int, at_most: int) -> set[int]:
    """Up to `at_most` of the numbers below n, the first and the last among them, evenly spread."""
    if n <= at_most:
        return set(range(n))
    return {i * (n - 1) // (at_most - 1) for i in range(at_most)}
