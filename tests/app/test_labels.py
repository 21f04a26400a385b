"""What a user writes about latents: kept with the run, whoever writes at the same time."""

import csv
import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette", reason="needs the extra mlsae[app]")
pytest.importorskip("httpx2", reason="needs httpx2, which starlette's client is made of")

from starlette.testclient import TestClient

from mlsae.app.__main__ import AppConfig
from mlsae.app.runs import Runs
from mlsae.errors import InputError
from mlsae.files import check_out
from mlsae.report import write_report
from mlsae.report.labels import read_labels, write_label
from mlsae.training.run_dir import RUN_FILES
from tests.helpers.app_run import guarded
from tests.helpers.make_run import make_run
from tests.helpers.packed import packed


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run", 64, 2, examples=1)
    return tmp_path / "run"


@pytest.fixture
def client(run):
    return TestClient(guarded(Runs(AppConfig((run,)))), base_url="http://127.0.0.1:1")


def test_labels_are_written_read_changed_and_removed(client, run):
    put = lambda latent, **body: client.put(f"/runs/0/labels/{latent}", json=body)  # noqa: E731
    assert client.get("/runs/0/labels").json() == {}
    put(7, label=" months ", notes="January\nand so on")
    assert put(3, label="<b>").json() == {
        "3": {"label": "<b>", "notes": ""},
        "7": {"label": "months", "notes": "January\nand so on"},
    }
    put(7, label="names of months")
    assert client.get("/runs/0/labels").json()["7"] == {"label": "names of months", "notes": ""}
    assert list(put(3, label="", notes=" ").json()) == ["7"]
    assert [path.name for path in run.glob("*label*")] == ["labels.json"]
    assert not (run / ".lock").exists()


def test_labels_are_exported(client, run):
    write_label(run, 7, 'a "b", c', "two\nlines")
    answer = client.get("/runs/0/labels.json")
    assert answer.json() == json.loads((run / "labels.json").read_text())
    assert "attachment" in answer.headers["content-disposition"]
    (row,) = csv.DictReader(io.StringIO(client.get("/runs/0/labels.csv").text))
    assert (row["latent"], row["label"], row["notes"]) == ("7", 'a "b", c', "two\nlines")
    assert client.get("/runs/0/labels.xml").status_code == 404


def test_nothing_is_lost_when_tabs_write_at_once(client, run):
    def write(i):
        return client.put(f"/runs/0/labels/{i % 12}", json={"label": f"{i}"}).status_code

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(write, range(36))) == {200}
    labels = read_labels(run)
    assert list(labels) == list(range(12))
    assert all(int(entry["label"]) % 12 == latent for latent, entry in labels.items())


def test_nothing_is_lost_when_two_programs_write_at_once(run):
    code = (
        "import sys; from pathlib import Path; from mlsae.report.labels import write_label\n"
        "for i in range(int(sys.argv[2]), 40, 2): write_label(Path(sys.argv[1]), i, 'x', '')"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(run), str(i)]) for i in range(2)]
    assert [program.wait() for program in both] == [0, 0]
    assert list(read_labels(run)) == list(range(40))


def test_what_cannot_be_a_label_is_refused(client):
    for latent, body, words in (
        (64, {"label": "x"}, "latent must be in [0, 63], got 64"),
        (1, {"label": "x" * 201}, "label must have at most 200 characters, got 201"),
        (1, {"notes": "x" * 4001}, "notes must have at most 4,000 characters, got 4,001"),
        (1, {"label": 3}, "label must be text"),
    ):
        answer = client.put(f"/runs/0/labels/{latent}", json=body)
        assert answer.status_code == 400
        assert words in answer.json()["error"]


def test_a_run_with_labels_can_be_replaced_and_resumed(run):
    write_label(run, 1, "x", "")
    check_out(run, True, False, RUN_FILES, 0)


def test_models_that_cannot_be_loaded_are_told(client):
    answer = client.get("/runs/0/status")  # of a folder without weights
    assert answer.status_code == 400
    assert "model.safetensors" in answer.json()["error"]
    assert client.get("/runs/0/data/latents").status_code == 200


@pytest.mark.parametrize("content", ["{", "[]", '{"x": {}}', '{"1": {"label": 3}}', "[" * 10**5])
def test_a_damaged_file_is_told_and_not_replaced(run, content):
    (run / "labels.json").write_text(content)
    for use in (read_labels, lambda folder: write_label(folder, 1, "x", ""), write_report):
        with pytest.raises(InputError, match=r"labels.json must hold labels"):
            use(run)
    assert (run / "labels.json").read_text() == content


def test_the_report_shows_labels(run):
    write_label(run, 7, "</script><b>months", "notes")
    write_report(run)
    page = (run / "report.html").read_text()
    assert packed(page, "latents")["labels"] == {
        "7": {"label": "</script><b>months", "notes": "notes"}
    }
    assert not re.search("<b>months", page)
