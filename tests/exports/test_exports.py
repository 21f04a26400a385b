"""What is written for other tools: delphi's cache, Neuronpedia's files; and labels that come back.

Legend: L layers, R rows, T positions, M latents.
"""

import gzip
import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import safetensors.numpy
import safetensors.torch
import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.analysis.run import AnalyzeConfig, analyze
from mlsae.data.tokens import not_special
from mlsae.errors import InputError
from mlsae.evaluation.heldout import HeldoutConfig, open_run
from mlsae.exports import delphi
from mlsae.exports.run import ExportConfig, export
from mlsae.report.labels import read_labels, write_label
from tests.helpers.neuronpedia_columns import COLUMNS, REQUIRED

M, K, LAYERS, TOKENS = 256, 4, (1, 3), 1024
PEER = Path(__file__).parent.parent / "helpers" / "peer_delphi.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An SAE of the built-in model that was not trained, and its analysis."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(192, M, K, LAYERS, model="builtin"))
    training = {"dataset": "builtin", "seq_len": 32, "drop_positions": [0]}
    mlsae.save_pretrained(folder, training=training)
    analyze(AnalyzeConfig(folder, tokens=TOKENS, resamples=2, examples=2, beside=()))
    return folder


@pytest.fixture(scope="module")
def cache(run):
    told = export(ExportConfig(run, to="delphi", tokens=TOKENS, splits=3, micro_tokens=256))
    assert told.endswith(f"delphi: {run}-delphi")
    return run.with_name("small-delphi")


def activations(run):
    """h (L, R, T, M) of the held-out text by the SAE's dense view, 0 at what is left out."""
    mlsae, stream = open_run(HeldoutConfig(run, tokens=TOKENS), torch.device("cpu"))
    input_ids = stream.heldout(TOKENS)
    x = stream.reader(input_ids).float()
    kept = not_special(input_ids, stream.tokenizer)
    kept[:, 0] = False
    return mlsae.sae.dense(mlsae.standardize(x).x) * kept[..., None], input_ids


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_delphis_cache_holds_what_is_active(run, cache):
    expected, input_ids = activations(run)
    for layer, name in enumerate(("layers.1", "layers.3")):
        found, ends = torch.zeros_like(expected[layer]), set()
        for path in (cache / name).glob("*.safetensors"):
            start, end = map(int, path.stem.split("_"))
            ends |= {(start, end)}
            arrays = safetensors.numpy.load_file(path)
            assert arrays["locations"].dtype == "uint16"
            assert (arrays["tokens"] == input_ids.numpy()).all()
            row, position, latent = arrays["locations"].T.astype("int64")
            assert latent.max() <= end - start
            flat = (row * input_ids.shape[1] + position) * M + start + latent
            found.view(-1)[torch.from_numpy(flat)] = torch.from_numpy(arrays["activations"]).float()
        assert ends == {(0, 84), (85, 169), (170, 255)}
        torch.testing.assert_close(found, expected[layer].half().float(), rtol=1e-3, atol=1e-3)
        about = json.loads((cache / name / "config.json").read_text())
        assert (about["model_name"], about["cache_ctx_len"], about["n_splits"]) == (
            "builtin",
            32,
            3,
        )
    assert not list(cache.rglob("*.spool"))


def test_delphi_reads_it(run, cache, tmp_path):
    """By its own loader, in its own environment; it finds examples to explain."""
    python = Path(os.environ.get("PEERS", "/nowhere")) / "delphi" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs an environment with eai-delphi: run bash scripts/check_peers.sh")
    out = tmp_path / "read.safetensors"
    command = [str(python), str(PEER), str(cache), str(out)]
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=keep)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1].split()[0]) > 50
    read, (expected, input_ids) = safetensors.torch.load_file(out), activations(run)
    assert torch.equal(read["tokens"], input_ids)
    for layer, name in enumerate(("layers.1", "layers.3")):
        found = torch.zeros_like(expected[layer])
        found[read[f"{name}.locations"].unbind(1)] = read[f"{name}.activations"]
        torch.testing.assert_close(found, expected[layer], rtol=1e-3, atol=1e-3)


def test_a_large_activation_does_not_overflow(tmp_path):
    """float16 ends at 65,504."""
    active = delphi.np.zeros(2, delphi._ACTIVE)
    active["activation"], active["location"] = [1e5, 1], [[70_000, 0, 9], [0, 1, 12]]
    active.tofile(tmp_path / "8.spool")
    assert delphi._write_split(tmp_path, 8, 16, torch.zeros(2, 3, dtype=torch.int64)) == 2
    arrays = safetensors.numpy.load_file(tmp_path / "8_15.safetensors")
    assert arrays["activations"].tolist() == [1e5, 1]
    assert (arrays["locations"] == [[70_000, 0, 1], [0, 1, 4]]).all()


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(delphi, "_write_split", full)
    (tmp_path / "new.partial" / "of a killed process").mkdir(parents=True)
    with pytest.raises(OSError, match="No space"):
        export(ExportConfig(run, to="delphi", tokens=64, out=tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_told_before_anything_is_written(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for settings, told in (
        ({}, "--to must be given, neuronpedia or delphi, or else --labels_from, and neither is"),
        ({"to": "delphi", "labels_from": tmp_path}, "and both are"),
        ({"to": "delphi", "out": tmp_path / "full"}, "--out must be a new or empty folder"),
        ({"to": "delphi", "splits": 0}, "--splits must be at least 1, got 0"),
        ({"to": "delphi", "splits": 500}, "--splits must be at most 256"),
        ({"to": "neuronpedia", "model_id": "a b"}, "--model_id must consist of letters"),
        ({"to": "neuronpedia", "run": tmp_path}, "there is no analysis.json; run python -m"),
    ):
        settings = {"run": run, "out": tmp_path / "new", "tokens": 64} | settings
        with pytest.raises(InputError, match=told):
            export(ExportConfig(**settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def rows_of(folder, table):
    plain = folder / f"{table}.jsonl"
    texts = [plain.read_text()] if plain.exists() else []
    texts += [gzip.decompress(p.read_bytes()).decode() for p in sorted((folder / table).glob("*"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def check(table, row):
    assert REQUIRED[table] <= row.keys()
    for name, value in row.items():
        kind = COLUMNS[table].get(name, COLUMNS[table].get(f"{name}?"))
        assert kind is not None, f"{table} has no column {name}"
        if isinstance(kind, list):
            assert all(type(each) is kind[0] for each in value), name
        elif not (value is None and f"{name}?" in COLUMNS[table]):
            assert type(value) is kind, name


@pytest.fixture(scope="module")
def sources(run):
    write_label(run, 7, "a label", "")
    export(ExportConfig(run, to="neuronpedia", model_id="tiny"))
    (run / "labels.json").unlink()
    return run.with_name("small-neuronpedia") / "tiny"


def test_neuronpedias_files_have_its_columns_and_keys(sources):
    assert {path.name for path in sources.iterdir()} == {f"{n}-res-mlsae-{M}" for n in LAYERS}
    ids = set()
    for folder in sources.iterdir():
        rows = {table: rows_of(folder, table) for table in COLUMNS}
        for table, found in rows.items():
            for row in found:
                check(table, row)
        (release,), (model,), (source_set,), (source,) = (
            rows[table] for table in ("release", "model", "sourceset", "source")
        )
        assert source_set["releaseName"] == release["name"]
        assert (source["id"], source["setName"]) == (folder.name, source_set["name"])
        assert {source["modelId"], source_set["modelId"]} == {model["id"]}
        keys = [(row["modelId"], row["layer"], row["index"]) for row in rows["features"]]
        assert len(set(keys)) == len(keys) > M // 2
        assert {(m, layer) for m, layer, _ in keys} == {(model["id"], source["id"])}
        for table in ("activations", "explanations"):
            assert {(row["modelId"], row["layer"], row["index"]) for row in rows[table]} <= set(
                keys
            )
            new = {row["id"] for row in rows[table]}
            assert len(new) == len(rows[table])
            assert not new & ids
            ids |= new
        assert [row["description"] for row in rows["explanations"]] == ["a label"]
        assert {row["index"] for row in rows["explanations"]} == {"7"}


def test_neuronpedias_numbers_are_the_analysis(run, sources):
    h, _ = activations(run)
    mlsae, stream = open_run(HeldoutConfig(run), torch.device("cpu"))
    n_tokens = json.loads((run / "analysis.json").read_text())["tokens"]
    W_U = stream.reader.model.get_output_embeddings().weight.double()
    promotes = mlsae.sae.W_dec.double() @ W_U.T
    for layer, name in enumerate(LAYERS):
        folder = sources / f"{name}-res-mlsae-{M}"
        active = (h[layer] > 1e-3).sum((0, 1))
        for row in rows_of(folder, "features"):
            latent = int(row["index"])
            assert row["frac_nonzero"] == pytest.approx(active[latent].item() / n_tokens)
            assert row["maxActApprox"] == pytest.approx(
                h[layer, ..., latent].max().item(), rel=2e-3
            )
            expected = promotes[latent].topk(10)
            assert row["pos_values"] == pytest.approx(expected.values.tolist(), rel=1e-3, abs=1e-4)
            assert row["pos_str"][0] == stream.tokenizer.decode([expected.indices[0]])
            lowest = promotes[latent].topk(10, largest=False).values.tolist()
            assert row["neg_values"] == pytest.approx(lowest, rel=1e-3, abs=1e-4)
            assert sum(row["logits_hist_data_bar_heights"]) == len(W_U)
        examples = rows_of(folder, "activations")
        shown = Counter(int(row["index"]) for row in examples)
        rare = [latent for latent in range(M) if 1 <= active[latent] <= 2]
        assert [shown[latent] for latent in rare] == active[rare].tolist()  # none twice
        for row in examples:
            assert len(row["tokens"]) == len(row["values"])
            assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
            own = row["values"][row["qualifyingTokenIndex"]]
            assert own > 0
            nearest = (h[layer, ..., int(row["index"])] - own).abs().min().item()
            assert nearest < 2e-3 * max(1, own)


def test_explanations_come_back_as_labels(run, tmp_path):
    folder = tmp_path / "explanations"
    folder.mkdir()
    long = "word " * 100
    for name, text in {
        "layers.1_latent7.txt": json.dumps("Unicode \n scripts"),
        "layers.3_latent7.txt": json.dumps("letters"),
        "layers.3_latent12.txt": json.dumps("numbers"),
        "layers.1_latent12.txt": json.dumps("numbers"),
        "layers.1_latent30.txt": "plain text",
        "latent31.json": json.dumps({"explanation": "of an object", "score": 1}),
        "layers.1_latent40.txt": json.dumps(long),
        "layers.1_latent41.txt": json.dumps("other"),
        "notes.txt": "of no latent",
    }.items():
        (folder / name).write_text(text)
    write_label(run, 41, "mine", "")
    told = export(ExportConfig(run, labels_from=folder))
    assert told == f"5 labels added to {run}; 1 latents have a label already, which stays"
    labels = read_labels(run)
    assert {latent: entry["label"] for latent, entry in labels.items() if latent != 40} == {
        7: "Unicode scripts", 12: "numbers", 30: "plain text", 31: "of an object", 41: "mine",
    }  # fmt: skip
    assert labels[7]["notes"] == "layers.1: Unicode scripts\nlayers.3: letters"
    assert labels[12]["notes"] == labels[30]["notes"] == ""
    assert labels[40]["label"].endswith("word…")
    assert len(labels[40]["label"]) <= 200
    assert labels[40]["notes"] == long.strip()
    (run / "labels.json").unlink()


def test_explanations_that_are_none_of_this_run_are_refused(run, tmp_path):
    for name, text, told in (
        ("a.txt", '"x"', "has none; give delphi's folder"),
        ("layers.1_latent256.txt", '"x"', "has 256 latents, and .* has one of latent 256"),
        ("layers.1_latent3.txt", "[1, 2]", "must hold a text, or an object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=told):
            export(ExportConfig(run, labels_from=tmp_path))
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="must be a folder of explanations"):
        export(ExportConfig(run, labels_from=tmp_path / "nowhere"))
    assert not (run / "labels.json").exists()
