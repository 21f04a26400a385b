"""Whom `python -m mlsae.app` answers, and how it begins."""

import socket
import sys

import pytest

pytest.importorskip("starlette", reason="needs the extra mlsae[app]")
pytest.importorskip("httpx2", reason="needs httpx2, which starlette's client is made of")

from starlette.testclient import TestClient

from mlsae.app.__main__ import AppConfig, run_app
from mlsae.app.runs import Runs
from mlsae.app.serve import serve
from mlsae.errors import InputError
from tests.helpers.app_run import guarded
from tests.helpers.make_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard") / "run"
    make_run(folder, 64, 2, examples=1)
    return folder


@pytest.fixture(scope="module")
def client(run):
    app = guarded(Runs(AppConfig((run,), device="cpu")))
    return TestClient(app, base_url="http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8765"}, 200),
        ({"Host": "[::1]:8765"}, 200),
        ({"Host": "evil.example"}, 403),  # whose name leads to this machine
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example@127.0.0.1", "Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 200),
        ({"Origin": "http://127.0.0.1:9"}, 403),  # another server on this machine
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_only_the_page_itself_is_served(client, headers, status):
    assert client.get("/runs/0/labels", headers=headers).status_code == status
    answer = client.put("/runs/0/labels/9", json={"label": "x"}, headers=headers)
    assert answer.status_code == status


def test_a_link_of_another_site_may_open_the_page_but_change_nothing(client):
    opened = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/runs/0/", headers=opened).status_code == 200
    assert client.post("/runs/0/prompt", json={"text": "x"}, headers=opened).status_code == 403


def test_a_token_is_asked_for_and_kept_by_the_browser(run):
    runs = Runs(AppConfig((run,), device="cpu"))
    client = TestClient(guarded(runs, "secret"), base_url="http://127.0.0.1:1")
    for path in ("/", "/runs/0/", "/runs/0/labels", "/plotly.js", "/?token=Secret", "/?token=ö"):
        assert client.get(path).status_code == 403, path
    assert client.post("/runs/0/prompt?token=secret", json={"text": "x"}).status_code == 403
    bearer = {"Authorization": "Bearer secret"}
    assert client.get("/runs/0/labels", headers=bearer).status_code == 200
    answer = client.get("/runs/0/?token=secret", follow_redirects=False)
    assert answer.headers["location"] == "/runs/0/"
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=strict" in answer.headers["set-cookie"]
    assert client.get("/runs/0/labels").status_code == 200  # by the cookie


def test_the_page_runs_its_own_scripts_only(client):
    answer = client.get("/runs/0/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "unsafe" not in scripts
    assert answer.text.count("<script>") == scripts.count("sha256-")


def test_bad_settings_are_told_before_anything_is_served(run, tmp_path, monkeypatch):
    def fails(words, **settings):
        with pytest.raises(InputError, match=words):
            run_app(AppConfig(**{"runs": (run,), **settings}))

    fails("RUN must be given at least once", runs=())
    fails("must be the folder of a finished training run", runs=(tmp_path,))
    fails("--port must be in", port=70_000)
    fails("--host must be an address of this machine", host="256.1.1.1")
    fails("--token must be ASCII letters and digits", token="a b")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        fails("--port must be free, and .* is in use", port=taken.getsockname()[1])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    fails("mlsae.app needs a package that is not installed: pip install uvicorn")


def test_an_address_for_others_has_a_token(run, monkeypatch, capsys):
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    serve(AppConfig((run,), host="0.0.0.0", port=0))
    assert "/?token=" in capsys.readouterr().out
    serve(AppConfig((run,), port=0))
    assert "token" not in capsys.readouterr().out
