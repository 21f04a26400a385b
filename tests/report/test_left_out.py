"""The report of runs that leave tokens out, beside special ones."""

import json

from mlsae.report import write_report
from mlsae.report.comparison import write_comparison
from tests.helpers.make_run import make_run


def test_what_is_left_out_and_what_it_changes_is_on_the_page(tmp_path):
    """In a run that was only trained, then in one that was evaluated; in neither by default."""
    folder, rule = tmp_path / "run", {"positions": [0], "tokens": [], "norm": 10.0, "medians": [1]}
    make_run(folder, analyzed=False)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").unlink()
    write_report(folder)
    assert "left out" not in (folder / "report.html").read_text().lower()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropped": rule}))
    *lines, last = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(last)
    last["heldout"] |= {"fvu_all": 0.0123, "top_share_layers": [0.02, 0.8, 0.1, 0.1, 0.1, 0.1]}
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(last)]))
    write_report(folder)
    page = (folder / "report.html").read_text()
    words = "position 0; norms above 10 × the median of their layer"
    assert f"<dt>left out</dt><dd>{words}</dd>" in page
    assert "0.012 with the tokens left out" in page
    assert f"Left out of these metrics beside special tokens: {words}." in page
    assert "carry 80% of the variance at layer 1" in page
    # An evaluation may leave out others.
    unknown = {"mean_interval": [None, None], "intervals": [[None, None]] * 6}
    figures = evaluation["figures"] | {
        "fvu_all": {"mean": 0.5678, "layers": [0.5] * 6, **unknown},
        "top_share": {"mean": 0.02, "layers": [0.02] * 6, **unknown},
    }
    evaluation |= {"figures": figures, "dropped": rule | {"positions": [], "norm": 20.0}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "0.568 with the tokens left out" in page
    assert "<td>0.5678</td>" in page
    assert "beside special tokens: norms above 20 × the median" in page
    assert "of the variance at layer" not in page
    make_run(tmp_path / "other", analyzed=False)
    write_comparison([folder, tmp_path / "other"], tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert "left out" not in page.split("So are runs that leave out different tokens")[0]
    assert "beside special ones: none; or norms above 20 ×" in page
    write_comparison([tmp_path / "other"], tmp_path / "c.html")
    assert "leave out" not in (tmp_path / "c.html").read_text()
