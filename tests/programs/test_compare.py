"""`python -m mlsae.compare`: one SAE for all layers against one of each."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlsae.compare import compare, parse
from mlsae.data.residuals import ResidualReader
from mlsae.data.stream import DataStream, read_shape
from mlsae.data.tokens import not_special
from mlsae.errors import InputError
from mlsae.evaluation.sharing import grid
from mlsae.model import MLSAE
from tests.helpers.programs import SMALL, program

LAYERS = (1, 3)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compare"
    result = program(*SMALL, "--layers", *LAYERS, "--out", out, module="mlsae.compare")
    assert result.returncode == 0, result.stderr
    with (out / "comparison.csv").open() as file:
        return out, result, list(csv.DictReader(file))


def test_every_sae_is_measured_at_every_layer(comparison):
    """Against FVU by its definition, in float64, of the weights in each folder."""
    out, result, rows = comparison
    found = {(row["trained_on"], int(row["measured_at"])): float(row["fvu"]) for row in rows}
    assert set(found) == {(name, layer) for name in ("all", "1", "3") for layer in LAYERS}
    config = parse([*SMALL])
    data = replace(config.data, layers=LAYERS)
    stream = DataStream(data, read_shape(data), torch.device("cpu"), micro_rows=1)
    input_ids = stream.heldout(config.eval_tokens)
    token_mask = not_special(input_ids, stream.tokenizer)
    residuals = ResidualReader(stream.reader.model, LAYERS)(input_ids)[:, token_mask]
    for name, folder in (("all", "all"), ("1", "layer-1"), ("3", "layer-3")):
        mlsae = MLSAE.from_pretrained(out / folder).requires_grad_(False)
        assert mlsae.config.layers == (LAYERS if name == "all" else (int(name),))
        for layer, x in zip(LAYERS, residuals, strict=True):
            error = (x.double() - mlsae(x).double()).square().sum()
            spread = (x.double() - x.double().mean(0)).square().sum()
            assert found[name, layer] == pytest.approx((error / spread).item(), rel=1e-4)
            assert f"{found[name, layer]:.4f}" in result.stdout
    # An SAE of a layer is better there than at the other one.
    assert found["1", 1] < found["1", 3]
    assert found["3", 3] < found["3", 1]


def test_the_saes_differ_in_their_layers_only(comparison):
    out, _, _ = comparison
    one, *others = (
        json.loads((out / name / "config.json").read_text())
        for name in ("all", "layer-1", "layer-3")
    )
    for other in others:
        assert {name for name in one if one[name] != other[name]} <= {
            "layers",
            "training",
            "heldout",
        }
        a, b = one["training"], other["training"]
        assert {name for name in a if a[name] != b[name]} == {"layers", "out"}


def test_it_goes_on_after_a_stop(comparison):
    """What was trained is not trained again, and the table is the same."""
    out, _, _ = comparison
    weights = (out / "layer-3" / "model.safetensors").read_bytes()
    text = (out / "comparison.csv").read_text()
    (out / "comparison.csv").unlink()
    found = compare(parse([*SMALL, "--layers", "1", "3", "--out", str(out), "--resume"]))
    assert (out / "layer-3" / "model.safetensors").read_bytes() == weights
    assert (out / "comparison.csv").read_text() == text
    assert grid(found, "fvu").shape == (3, 2)


def test_bad_input_is_named_before_anything_is_trained(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    for arguments, message in (
        (["--sae.k", "4", "8"], "must have one value each"),
        (["--seeds", "0", "1"], "--seeds must have one value each"),
        (["--overwrite"], "has note.txt in it"),
        ([], "--out must be a new or empty folder"),
    ):
        with pytest.raises(InputError, match=message):
            compare(parse([*SMALL, "--out", str(tmp_path), *arguments]))
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="must run as one process"):
        compare(parse([*SMALL, "--out", str(tmp_path / "new")]))
    assert not (tmp_path / "new").exists()


def test_its_defaults_are_those_of_training_but_short():
    assert parse([]).tokens < parse(["--preset", "paper"]).tokens
    assert parse([]).out == parse(["--preset", "paper"]).out == Path("runs/compare")
