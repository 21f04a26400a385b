"""`python -m mlsae.sharing`: one SAE of all layers beside SAEs of one layer each."""

import csv

from test_train import SMALL, program

from mlsae import MLSAE


def test_each_sae_at_every_layer(tmp_path):
    out = tmp_path / "out"
    result = program(*SMALL, "--layers", 1, 4, "--out", out, module="mlsae.sharing")
    assert result.returncode == 0, result.stderr
    layers = {"shared": (1, 4), "layer-1": (1,), "layer-4": (4,)}
    for name, trained in layers.items():
        assert MLSAE.from_pretrained(out / name).config.layers == trained
    rows = list(csv.DictReader((out / "sharing.csv").read_text().splitlines()))
    assert [(row["sae"], row["layer"]) for row in rows] == [
        (name, layer) for name in layers for layer in ("1", "4")
    ]
    fvu = {(row["sae"], row["layer"]): float(row["fvu"]) for row in rows}
    assert fvu["layer-1", "1"] < fvu["layer-4", "1"]
    assert f"{fvu['shared', '1']:.3f}" in result.stdout
    result = program(*SMALL, "--resume", "--out", out, module="mlsae.sharing")
    assert result.returncode == 2
    assert "got --resume" in result.stderr
