"""The build for Hugging Face's hub of kernels: loaded as `kernels` loads it, twice in a process."""

import importlib
import importlib.util
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import sparse_topk
from scripts.hub_kernel import KERNELS, lay_out
from sparse_topk import reference


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Two builds: of the package, and of another version of it."""
    folder = tmp_path_factory.mktemp("kernels")
    lay_out(folder / "one", repo="somebody/sparse-topk")
    other = folder / "source"
    shutil.copytree(KERNELS / "sparse_topk", other)
    with (other / "codes.py").open("a") as file:
        file.write("\n# another version\n")
    lay_out(folder / "two", other)
    return folder / "one", folder / "two"


def load(build, backend="cpu"):
    """As `kernels.importer` does: a module of any path, whose name is the metadata's id."""
    variant = build / "build" / f"torch-{backend}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(builds):
    modules = [load(build) for build in builds]
    yield modules
    for name in [n for n in sys.modules if n.startswith("_sparse_topk_cpu_")]:
        del sys.modules[name]


def check(kernel):
    """Against dense float64: outputs and all gradients of one SAE."""
    torch.manual_seed(0)
    sae = kernel.SparseTopKSAE(6, 20, 3, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    output = sae.reconstruct(x)
    dense = reference.topk_sae(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
    torch.testing.assert_close(output.x_hat, dense)
    parameters = list(sae.parameters())
    ours = torch.autograd.grad((output.x_hat - x).square().sum(), parameters)
    theirs = torch.autograd.grad((dense - x).square().sum(), parameters)
    torch.testing.assert_close(ours, theirs)


def test_two_versions_and_the_package_compute_side_by_side(loaded):
    names = {kernel.__name__ for kernel in loaded}
    assert len(names) == 2
    for kernel in (*loaded, sparse_topk):
        check(kernel)
    for name in names:  # each has its operators in a namespace of its own
        importlib.import_module(f"{name}.training_ops")
        assert getattr(torch.ops, name).topk_encode.default.namespace == name
        assert getattr(torch.ops, name).standardize.default.namespace == name


def test_a_build_runs_its_own_triton_kernels(loaded, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("SPARSE_TOPK_BACKEND", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = loaded[1]
    x, W = torch.randn(4, 8, device=device), torch.randn(16, 8, device=device)
    values, _ = kernel.topk_encode(x, W, None, 2)
    expected = (x @ W.T).topk(2).values.relu()
    torch.testing.assert_close(values.sort(descending=True).values, expected)
    assert f"{kernel.__name__}.triton_ops.topk.encode" in sys.modules


def test_the_repository_is_laid_out_as_the_hub_asks(builds):
    one, _ = builds
    assert {path.name for path in one.iterdir()} == {
        "README.md", "build", "build.toml", "flake.nix", "torch-ext",
    }  # fmt: skip
    assert 'get_kernel("somebody/sparse-topk"' in (one / "README.md").read_text()
    assert {path.name for path in (one / "build").iterdir()} == {"torch-cpu", "torch-cuda"}
    ids = set()
    for backend in ("cpu", "cuda"):
        for build in builds:
            variant = build / "build" / f"torch-{backend}"
            metadata = json.loads((variant / "metadata.json").read_text())
            assert metadata["name"].replace("-", "_") == "sparse_topk"
            assert metadata["backend"]["type"] == backend
            files = {p.relative_to(variant).as_posix() for p in variant.rglob("*") if p.is_file()}
            assert metadata["digest"]["files"].keys() == files - {"metadata.json"}
            ids.add(metadata["id"])
    assert len(ids) == 4
    assert all(name.isidentifier() for name in ids)


def test_a_build_exports_what_the_package_does(loaded):
    assert loaded[0].__all__ == sparse_topk.__all__
    assert not hasattr(loaded[0].SparseTopKSAE, "from_pretrained")


def test_the_example_of_the_card_runs(builds, loaded, monkeypatch):
    card = (builds[0] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for shown, small in (('device="cuda"', 'device="cpu"'), ("4096", "64"), ("32768", "256")):
        assert shown in example
        example = example.replace(shown, small)
    hub = types.SimpleNamespace(get_kernel=lambda name, version, trust_remote_code: loaded[0])
    monkeypatch.setitem(sys.modules, "kernels", hub)
    scope = {}
    exec(example, scope)
    assert scope["codes"].values.shape == (64, 32)
    assert scope["W_enc"].grad.any()


def test_the_kernels_package_loads_it(builds):
    """What needs the package of Hugging Face: `make check-kernels` has it."""
    kernels = pytest.importorskip("kernels")
    if not hasattr(kernels, "get_local_kernel"):  # this project's folder, which has no package
        pytest.skip("needs the Hugging Face package `kernels`")
    one, two = (kernels.get_local_kernel(Path(build / "build")) for build in builds)
    assert one.__name__ != two.__name__
    for kernel in (one, two):
        check(kernel)
