"""Converted SAEs against the real classes of the other libraries, each in its own environment.

`bash scripts/check_peers.sh` creates the environments and runs these tests.

Legend: N tokens, D inputs, M latents, K active latents per token.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsae import MLSAE, DenseSAE, MLSAEConfig, formats
from mlsae.formats import SavedSAE
from tests.helpers.peer_files import sae

ROOT = Path(__file__).parent.parent.parent
HELPERS = ROOT / "tests" / "helpers"
N, D, M, K = 512, 16, 64, 6
LIBRARIES = {"sparsify": False, "saelens": True, "dictionary_learning": False}


def python_of(library):
    """The Python of the library's environment; skips the test if there is none."""
    path = Path(os.environ.get("PEERS", "/nowhere")) / library / "bin" / "python"
    if not path.exists():
        pytest.skip(f"needs an environment with {library}: run bash scripts/check_peers.sh")
    return path


def run(python, *arguments, **environment):
    keep = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [str(python), *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**keep, **environment}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("library", LIBRARIES)
def test_outputs_agree_in_both_directions(tmp_path, library):
    """Our SAE run by their class, and their SAE run by ours: float32 on both sides."""
    python = python_of(library)
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * 2 + 1
    ours = SavedSAE(sae(0, D, M), K, LIBRARIES[library], (2,), "some/model")
    formats.write(ours, tmp_path / "converted", library)
    save_file({"x": x}, tmp_path / "x.safetensors")
    run(python, HELPERS / "peer.py", library, tmp_path)
    for name in ("converted", "native"):
        theirs = load_file(tmp_path / f"{name}.safetensors")
        saved = ours if name == "converted" else formats.read(tmp_path / name)
        view = DenseSAE(MLSAE.from_saved(saved))
        f = view.encode(x)
        errors = [
            (actual - expected).abs().max().item() / expected.abs().max().item()
            for actual, expected in ((f, theirs["f"]), (view.decode(f), theirs["x_hat"]))
        ]
        print(f"{library}, {name}: largest difference of f {errors[0]:.1e}, x̂ {errors[1]:.1e}")
        assert max(errors) < 1e-5, "relative to the largest output"
        assert torch.equal(f > 0, theirs["f"] > 0)


@pytest.mark.parametrize(("library", "n_kinds"), [("saelens", 11), ("dictionary_learning", 4)])
def test_their_saes_with_thresholds_compute_the_same_here(tmp_path, library, n_kinds):
    """Sparse and dense activations, and reconstructions; the codes are as wide as the SAE."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * 2 + 1
    save_file({"x": x}, tmp_path / "x.safetensors")
    run(python_of(library), HELPERS / "peer_thresholds.py", library, tmp_path)
    kinds = [path.stem for path in tmp_path.glob("*.path")]
    assert len(kinds) == n_kinds
    for kind in kinds:
        theirs = load_file(tmp_path / f"{kind}.safetensors")
        mlsae = MLSAE.from_saved(formats.read(tmp_path / (tmp_path / f"{kind}.path").read_text()))
        values, indices = mlsae.encode(x)
        sparse = torch.zeros_like(theirs["f"]).scatter(1, indices, values)
        view = DenseSAE(mlsae)
        found = ((sparse, "f"), (view.encode(x), "f"), (view(x), "x_hat"), (mlsae(x), "x_hat"))
        errors = [
            ((actual - theirs[name]).abs().max() / theirs[name].abs().max()).item()
            for actual, name in found
        ]
        print(f"{library}, {kind}: largest differences {', '.join(f'{e:.1e}' for e in errors)}")
        assert max(errors) < 1e-5, "relative to the largest output"
        assert torch.equal(sparse > 0, theirs["f"] > 0)


def test_saebench_takes_the_dense_view():
    """SAEBench's check of norms, its test of an SAE in a transformer, its metrics of weights."""
    out = run(
        python_of("saelens"), HELPERS / "peer_saebench.py",
        PYTHONPATH=f"{ROOT}/kernels:{ROOT}",
    )  # fmt: skip
    assert "average l0: 6.0" in out
    assert out.endswith("ok\n")


def test_sae_probes_takes_the_dense_view(tmp_path):
    """Its probes of one latent and of 16, on a dataset that it ships. Even an SAE that was not
    trained has a latent that tells its classes."""
    torch.manual_seed(0)
    MLSAE(MLSAEConfig(192, 512, 16, (1, 3), model="builtin")).save_pretrained(tmp_path / "run")
    out = run(
        python_of("saelens"), HELPERS / "peer_probes.py", tmp_path / "run", 3,
        PYTHONPATH=f"{ROOT}/kernels:{ROOT}",
    )  # fmt: skip
    print(out[out.index("k = 1:") :])
    assert all(float(line.split()[-1]) > 0.6 for line in out.splitlines() if line.startswith("k ="))
