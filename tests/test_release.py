"""What `pip install` gets: the source distribution, and the wheel that is built from it."""

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(what, source, out):
    """The path of what setuptools builds of the folder `source`, without the network."""
    result = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{what}", str(out)],
        cwd=source,
        check=True,
        capture_output=True,
        text=True,
    )
    return out / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, unpacked. setuptools leaves files beside what it builds, so that is a copy."""
    tmp = tmp_path_factory.mktemp("sdist")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", ".*", "runs")
    shutil.copytree(ROOT, tmp / "tree", ignore=skipped)
    with tarfile.open(build("sdist", tmp / "tree", tmp)) as archive:
        archive.extractall(tmp, filter="data")
    (unpacked,) = tmp.glob("mlsae-*/")
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    with zipfile.ZipFile(build("wheel", sdist, tmp_path_factory.mktemp("wheel"))) as archive:
        yield archive


def test_the_wheel_holds_our_two_packages_whole_and_nothing_else(wheel):
    """A wheel with a top-level `kernels` would overwrite the package of Hugging Face."""
    source = {
        file.relative_to(base).as_posix()
        for base, package in ((ROOT, "mlsae"), (ROOT / "kernels", "sparse_topk"))
        for file in (base / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == source
    assert {"mlsae/py.typed", "mlsae/builtin/model/model.safetensors"} <= source


def test_the_metadata_tell_an_index_what_the_package_is(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    assert any(url.startswith("Paper, https://") for url in metadata.get_all("Project-URL"))
    supported = {"3.11", "3.12", "3.13", "3.14"}
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: {version}" for version in supported} <= set(
        classifiers
    )
    assert not any(classifier.startswith("License ::") for classifier in classifiers)  # PEP 639
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_source_distribution_can_be_tested_and_read(sdist):
    for needed in (
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "constraints.txt",
        "docs/architecture.md", "scripts/check_install.sh", "tests/conftest.py",
        "tests/helpers/models.py", "bench/ledger.py", "kernels/hub/build.toml",
    ):  # fmt: skip
        assert (sdist / needed).is_file(), needed


def test_every_library_that_is_imported_is_declared(wheel):
    """By the names of imports; one that only an option brings is imported late, and mlsae.app has
    the extra of its name."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
    always, of_app = (
        {
            requirement.split(";")[0].split(">")[0].split("[")[0].strip().replace("-", "_").lower()
            for requirement in requirements
            if extra in requirement or "extra ==" not in requirement
        }
        for extra in ("no extra", 'extra == "app"')
    )
    own = {"mlsae", "sparse_topk"} | sys.stdlib_module_names
    for file in wheel.namelist():
        if not file.endswith(".py"):
            continue
        declared = of_app if file.startswith("mlsae/app/") else always
        for node in ast.parse(wheel.read(file)).body:  # what is imported with the module
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            names = {module.split(".")[0] for module in modules} - own
            assert names <= declared, f"{file}: {names - declared}"
