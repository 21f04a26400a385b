"""Build the documentation as a site, offline, with warnings as errors.

    python -m scripts.build_docs                       # build/site
    python -m http.server --directory build/site       # then look at http://localhost:8000

The pages are copied to where they are in the repository, README.md first, so that the same relative
links work on the site and in the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "build" / "site-source"
PAGES = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "docs/*",
    "bench/NOTES.md", "bench/results/*", "mlsae/builtin/model/README.md", "notebooks/*.ipynb",
)  # fmt: skip


def copy_pages() -> None:
    """Copy what the site shows, or links to, to `SOURCE`."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for pattern in PAGES:
        for path in ROOT.glob(pattern):
            copy = SOURCE / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def main() -> int:
    """Build the site; return the exit code of the builder."""
    copy_pages()
    shutil.rmtree(ROOT / "build" / "site", ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
