"""What the page shows of several layers that were replaced at once."""

import json

from mlsae.report.page import write_report
from mlsae.report.run_data import read_run_data
from tests.helpers.make_run import make_run


def test_the_page_shows_them_if_they_were_measured(tmp_path):
    make_run(tmp_path, analyzed=False)
    write_report(tmp_path)
    assert "from here on" not in (tmp_path / "report.html").read_text()
    path = tmp_path / "evaluation.json"
    content = json.loads(path.read_text())
    n_layers = len(content["layers"])
    for i, name in enumerate(("delta_ce_from", "recovered_from", "kl_from", "top1_from")):
        values = [1.1111 + i, *[None] * (n_layers - 1)]  # as with --joint all
        content["figures"][name] = {
            "mean": None, "mean_interval": [None, None], "layers": values,
            "intervals": [[None, None]] * n_layers,
        }  # fmt: skip
    path.write_text(json.dumps(content))
    assert read_run_data(tmp_path).evaluation["figures"]["kl_from"]["layers"][0] == 3.1111
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    for shown in ("ΔCE, from here on", "<td>1.111</td>", "<td>3.111</td>", "<td>211.1%</td>"):
        assert shown in page
    assert "that layer and all above it at once (hatched)" in page
