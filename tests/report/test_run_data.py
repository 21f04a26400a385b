"""A page is drawn from the files of a run, or the file that is damaged is named."""

import copy
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch

from mlsae.errors import InputError
from mlsae.report import redraw, write_report
from mlsae.report.comparison import write_comparison
from mlsae.report.run_data import read_run_data
from tests.helpers.make_run import make_run

FILES = ("config.json", "evaluation.json", "analysis.json", "analysis_prompt.json")
DELETED = object()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    make_run(folder, 64, 3, examples=1, others=("runs/b",))
    return folder


@pytest.fixture
def run(made, tmp_path):
    """The same files elsewhere, to damage."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def places(content):
    """Every (container, key) of JSON; of a list the first, of many metrics a few."""
    keys = list(content) if isinstance(content, dict) else range(min(1, len(content)))
    if "delta_ce" in keys:
        keys = ["fvu", "delta_ce", "kl"]
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from places(content[key])


def damaged(content, wrong):
    """Copies of JSON `content`, each with one value that is wrong, or missing."""
    for i in range(len(list(places(content)))):
        changed = copy.deepcopy(content)
        container, key = list(places(changed))[i]
        if wrong is DELETED:
            del container[key]
        else:
            container[key] = wrong
        yield changed


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("wrong", [DELETED, None, "x", [], 10**400])
def test_a_value_of_the_wrong_kind_is_refused_or_a_page_is_drawn(run, name, wrong, monkeypatch):
    monkeypatch.setattr("mlsae.report.page.packed_plotly", lambda: "")  # the same every time
    content = json.loads((run / name).read_text())
    refused = 0
    for changed in damaged(content, wrong):
        (run / name).write_text(json.dumps(changed))
        try:
            read_run_data(run)
        except InputError:
            refused += 1
        else:
            write_report(run)
    assert refused >= 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]", "line 2 of metrics.jsonl must be an object"),
        ('{"tokens": 1', "line 2 of metrics.jsonl must be JSON"),
        ('{"loss": 1}', "line 2 of metrics.jsonl must have 'tokens'"),
        ('{"loss": 1, "tokens": 1, "dead": 0, "fvu": 1, "fvu_layers": [1]}', "a list of 3"),
        ('{"heldout": {"fvu": "x"}, "tokens": 1}', "heldout.fvu must be a number"),
        ('{"heldout": 3, "tokens": 1}', "heldout must be an object"),
    ],
)
def test_a_damaged_line_of_the_log_is_numbered(run, line, told):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(InputError, match=told):
        read_run_data(run)


def change_tensor(path, name, change):
    tensors = safetensors.torch.load_file(path)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None, lambda x: x[1:].clone(), lambda x: x.T.contiguous(), lambda x: x.long(),
        lambda x: x.to(torch.complex64),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("analysis.safetensors", "profile"),
        ("analysis.safetensors", "totals"),
        ("latents.safetensors", "totals"),
    ],
)
def test_a_tensor_of_another_shape_is_named(run, file, name, change):
    change_tensor(run / file, name, change)
    with pytest.raises(InputError, match=rf"{name} in {file} must be floating-point of shape"):
        read_run_data(run)


@pytest.mark.parametrize("change", [lambda x: x * math.nan, lambda x: x * 0, lambda x: -x.abs()])
def test_a_page_is_drawn_from_odd_activations(run, change):
    for file, name in (("analysis.safetensors", "profile"), ("analysis.safetensors", "totals")):
        change_tensor(run / file, name, change)
    write_report(run)


def change_column(path, name, change):
    table = pyarrow.parquet.read_table(path)
    i = table.column_names.index(name)
    values = change(table[name].to_pylist())
    table = table.set_column(i, name, values) if values is not None else table.remove_column(i)
    pyarrow.parquet.write_table(table, path)


TEXT = pyarrow.list_(pyarrow.string())


@pytest.mark.parametrize(
    ("file", "name", "change"),
    [
        ("latents", "latent", lambda _: None),
        ("latents", "latent", lambda x: pyarrow.array([-1, *x[1:]])),
        ("latents", "latent", lambda x: pyarrow.array([10**9, *x[1:]])),
        ("latents", "latent", lambda x: pyarrow.array(["x"] * len(x))),
        ("latents", "tokens_active", lambda x: pyarrow.nulls(len(x), pyarrow.int64())),
        ("latents", "entropy", lambda _: None),
        ("latents", "tokens_in", lambda x: pyarrow.array(["x"] * len(x))),
        ("examples", "layer", lambda _: None),
        ("examples", "latent", lambda x: pyarrow.nulls(len(x), pyarrow.int64())),
        ("examples", "latent", lambda x: pyarrow.array([10**9, *x[1:]])),
        ("examples", "position", lambda x: pyarrow.array([-1, *x[1:]])),
        ("examples", "position", lambda x: pyarrow.array([25, *x[1:]])),
        ("examples", "activation", lambda x: pyarrow.array([None, *x[1:]])),
        ("examples", "kind", lambda x: pyarrow.array(range(len(x)))),
        ("examples", "tokens", lambda x: pyarrow.array([[], *x[1:]], TEXT)),
        ("examples", "tokens", lambda x: pyarrow.array([[None] * 25, *x[1:]], TEXT)),
        ("examples", "activations", lambda x: pyarrow.array([[1.0], *x[1:]])),
    ],
)
def test_a_damaged_table_is_named(run, file, name, change):
    change_column(run / f"analysis_{file}.parquet", name, change)
    with pytest.raises(InputError, match=rf"analysis_{file}\.parquet"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_metric_that_is_not_finite_is_a_dash(run):
    """FVU of a text without variance: JSON has null."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    for name in ("fvu", "delta_ce"):
        evaluation["figures"][name] |= {"mean": None, "mean_interval": [None, None]}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    write_report(run)
    page = (run / "report.html").read_text()
    assert '<span class="name">FVU</span> <strong>–</strong>' in page


def test_an_sae_whose_layers_are_not_known_has_a_page(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"layers": []}))
    for name in ("latents.safetensors", "metrics.jsonl"):
        (run / name).unlink()
    write_report(run)
    assert "not named" in (run / "report.html").read_text()


def test_a_folder_that_is_no_run_is_named(run):
    (run / "loop").symlink_to("loop")
    for name in ("loop", "missing", "config.json", "x" * 300):
        for draw in (
            lambda path: write_report(path),
            lambda path: write_comparison([run, path], run / "c.html"),
        ):
            with pytest.raises(InputError, match="RUN must be the folder of a finished training"):
                draw(run / name)
    assert not (run / "c.html").exists()


def test_the_way_out_is_the_program_that_measures_again(run):
    write_report(run)
    for name, program in (("evaluation.json", "evaluate"), ("analysis.json", "analyze")):
        content = (run / name).read_bytes()
        (run / name).write_text("{}")
        with pytest.raises(InputError, match=f"cannot be redrawn: .*again with mlsae.{program}"):
            redraw(run)
        (run / name).write_bytes(content)


@pytest.mark.parametrize("wrong", [3, [1], {"layers": 3}, {"layers": ["x"] * 3}])
@pytest.mark.parametrize("name", ["fvu_all", "top_share"])
def test_what_only_newer_measurements_have_is_checked_too(run, name, wrong):
    path = run / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["figures"][name] = wrong
    path.write_text(json.dumps(evaluation))
    with pytest.raises(InputError, match=rf"evaluation\.json\.figures\.{name}.* must "):
        read_run_data(run)
    evaluation["figures"][name] = evaluation["figures"]["fvu"]
    path.write_text(json.dumps(evaluation))
    write_report(run)


@pytest.mark.parametrize("name", ["fvu_all", "top_share_layers"])
def test_what_only_newer_runs_log_is_checked_too(run, name):
    path = run / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    validation = json.loads(last)
    validation["heldout"][name] = {"x": 1}
    path.write_text("\n".join([*lines, json.dumps(validation)]))
    with pytest.raises(InputError, match=rf"metrics\.jsonl\.heldout\.{name} must be "):
        read_run_data(run)
