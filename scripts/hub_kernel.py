"""Lay out `sparse_topk` as a repository of Hugging Face's hub of kernels.

    python -m scripts.hub_kernel OUT [--repo USER/sparse-topk]

OUT then holds what the hub wants (huggingface.co/docs/kernels, "Kernel requirements"): the source
for kernel-builder (build.toml, flake.nix, torch-ext/) and what kernel-builder would make of it,
without Nix: build/torch-cpu and build/torch-cuda, each with _ops.py, whose namespace is unique to
the sources, and metadata.json. `kernels.get_local_kernel(Path("OUT/build"))` loads it; `hf upload`
pushes it. Loading and saving SAEs is left out: a kernel may import torch and Triton only.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "kernels"
LEFT_OUT = ("hub.py", "loading.py", "_ops.py")  # of the package; the last is written per build

_OPS = '''"""The namespace of the torch operators, unique to this build."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of the operator `op_name`."""
    return f"{id}::{{op_name}}"
'''


def lay_out(out: Path, package: Path = KERNELS / "sparse_topk", repo: str | None = None) -> None:
    """Write the repository to `out`, which must not exist; its card names `repo`."""
    out.mkdir(parents=True)
    for name in ("build.toml", "flake.nix"):
        shutil.copy(KERNELS / "hub" / name, out)
    card = (KERNELS / "hub" / "README.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(card.replace("USER/sparse-topk", repo or "USER/sparse-topk"))
    source = out / "torch-ext" / "sparse_topk"
    skipped = shutil.ignore_patterns("__pycache__", *LEFT_OUT)
    shutil.copytree(package, source, ignore=skipped)
    init = source / "__init__.py"
    from_hub = "from .hub import SparseTopKSAE\n"
    text = init.read_text()
    assert text.count(from_hub) == 1
    init.write_text(text.replace(from_hub, "from .module import SparseTopKSAE\n"))

    general = tomllib.loads((out / "build.toml").read_text())["general"]
    revision = _digest(source)
    for backend in general["backends"]:
        variant = out / "build" / f"torch-{backend}"
        shutil.copytree(source, variant)
        unique = f"_sparse_topk_{backend}_{revision}"
        (variant / "_ops.py").write_text(_OPS.format(id=unique))
        metadata = {
            "name": general["name"],
            "id": unique,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": _hashes(variant)},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in base 64, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in _files(folder)
    }


def _digest(folder: Path) -> str:
    """Seven hexadecimal digits that change with any file of the folder."""
    return hashlib.sha256(json.dumps(_hashes(folder)).encode()).hexdigest()[:7]


def main() -> None:
    """Run the program."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.hub_kernel",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--repo", help="the repository on the hub that the card names")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"OUT must be a new folder, and {given.out} exists; give another one")
    lay_out(given.out, repo=given.repo)
    print(f"{given.out}: load it with kernels.get_local_kernel(Path('{given.out}/build'))")


if __name__ == "__main__":
    main()
