"""What `python -m mlsae.app` answers: prompts, predictions, continuations, traces.

Legend: T positions, D width of the residual stream, M latents, K active per token, L layers.
"""

import http.client
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
import transformers

pytest.importorskip("starlette", reason="needs the extra mlsae[app]")
pytest.importorskip("httpx2", reason="needs httpx2, which starlette's client is made of")

from starlette.testclient import TestClient

from mlsae import MLSAE
from mlsae.app.__main__ import AppConfig
from mlsae.app.runs import Runs
from mlsae.intervention import Edit, intervene
from tests.helpers.app_run import D, K, L, M, app_run, guarded, served
from tests.helpers.lenses import save_tuned_lens
from tests.helpers.models import forward_with_hook

TEXT = "def main(argv):"
EDIT = {"latent": 3, "layers": [1], "op": "add", "value": 60.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return app_run(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def client(run):
    app = guarded(Runs(AppConfig((run,), device="cpu")))
    return TestClient(app, base_url="http://127.0.0.1:1")


@pytest.fixture(scope="module")
def model(run):
    return transformers.AutoModelForCausalLM.from_pretrained(run.parent / "model").eval()


@pytest.fixture(scope="module")
def ids(run):
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.parent / "model")
    return tokenizer(TEXT, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def mlsae(run):
    return MLSAE.from_pretrained(run).requires_grad_(False)


def asked(client, path, **body):
    answer = client.post(f"/runs/0/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def generated(client, **body):
    with client.stream("POST", "/runs/0/generate", json={"text": TEXT, **body}) as answer:
        assert answer.status_code == 200
        return [json.loads(line) for line in answer.iter_lines()]


def test_a_page_answers_before_torch_has_come():
    code = (
        "import sys\n"
        "from mlsae.app import __main__, serve\n"
        "assert not {'torch', 'numpy', 'transformers', 'plotly'} & set(sys.modules), 'slow'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prompt_has_the_latents_that_dense_mathematics_finds(client, model, mlsae, ids):
    found = asked(client, "prompt", text=TEXT)
    assert "".join(found["tokens"]) == TEXT
    dense = torch.zeros(L, len(ids[0]), M, dtype=torch.float64)
    entries = found["entries"]
    dense[entries["layer"], entries["token"], entries["latent"]] = torch.tensor(
        entries["value"], dtype=torch.float64
    )
    assert len(entries["value"]) <= L * len(ids[0]) * K
    # Layer 0 is what Hugging Face calls the second hidden state.
    x = model(ids, output_hidden_states=True).hidden_states[1][0].double()
    x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    scores = (x - mlsae.sae.b_dec.double()) @ mlsae.sae.W_enc.double().T
    kth = scores.topk(K).values[:, -1:]
    wanted = torch.where(scores >= kth, scores, 0).relu()
    torch.testing.assert_close(dense[0], wanted, rtol=1e-4, atol=1e-5)


def test_next_tokens_are_the_models_and_those_of_reconstructions(client, model, mlsae, ids):
    at = 2
    found = asked(client, "next", text=TEXT, position=at, edits=[EDIT])["rows"]
    assert [row["name"] for row in found] == ["model", "changed", "0", "1"]
    states = model(ids, output_hidden_states=True).hidden_states
    truth = model(ids).logits[0, at].double().log_softmax(-1)
    x_hat = mlsae.reconstruct(states[1]).x_hat
    other = forward_with_hook(model, ids, 0, x_hat)[0, at].double()
    for row, logits in ((found[0], model(ids).logits[0, at].double()), (found[2], other)):
        log_p = logits.log_softmax(-1)
        best = [token["p"] for token in row["tokens"]]
        assert best == pytest.approx(log_p.exp().topk(len(best)).values.tolist(), rel=1e-3)
        assert row["tokens"][0]["logit"] == pytest.approx(logits.max().item(), rel=1e-3)
        kl = (truth.exp() * (truth - log_p)).sum().item()
        assert row["kl"] == pytest.approx(kl, rel=1e-2, abs=1e-6)
    assert found[1]["kl"] > 0


def test_a_text_goes_on_with_and_without_changes(client, model, mlsae, ids, run):
    events = generated(client, edits=[EDIT], max_new_tokens=6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.parent / "model")

    def greedy():
        whole = model.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        return tokenizer.decode(whole[0, ids.shape[1] :])

    with intervene(model, mlsae, [Edit(3, (1,), "add", 60.0)]):
        steered = greedy()
    wanted = {"baseline": greedy(), "steered": steered}
    assert wanted["baseline"] != steered
    for side, text in wanted.items():
        own = [event for event in events if event.get("side") == side]
        assert own[-1] == {"side": side, "text": text, "done": True}
        so_far = [event["text"] for event in own[:-1]]
        assert so_far
        assert all(text.startswith(part) for part in so_far)
        counts = [event["tokens"] for event in own[:-1]]
        assert counts == sorted(set(counts))
    only = generated(client, edits=[EDIT], max_new_tokens=6, sides=["steered"])
    assert {event["side"] for event in only} == {"steered"}


def test_a_prediction_is_traced(client, model, ids):
    found = asked(client, "trace", text=TEXT, check=2)
    logits = model(ids).logits[0, -1].double()
    wanted = (logits.max() - logits.mean()).item()
    assert found["target"]["value"] == pytest.approx(wanted, rel=1e-3)
    assert set(found["plots"]) == {"flows", "latents", "errors", "checks"}
    assert len(found["flows"]) == len(found["plots"]["flows"]["layout"]["xaxis"]["ticktext"])
    places = {(token, latent) for token, latent in found["flows"]}
    nodes = found["nodes"]
    assert found["edges"]
    for edge in found["edges"]:
        assert nodes["layer"][edge["source"]] < nodes["layer"][edge["sink"]]
        assert (nodes["token"][edge["source"]], nodes["latent"][edge["source"]]) in places


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("prompt", {}, "text must be given"),
        ("prompt", {"text": 3}, "text must be text, got 3"),
        ("prompt", {"text": ""}, "a token that is not special"),
        ("prompt", {"text": "x " * 500}, "at most 64 tokens"),
        ("prompt", {"text": "\ud800"}, "half a character"),
        ("prompt", {"text": "x" * 70_000}, "at most 64,000 bytes"),
        ("next", {"text": "x", "position": 9}, "position must be in [0, 0], got 9"),
        ("next", {"text": "x", "position": 0, "edits": [3]}, "an edit must be an object"),
        (
            "next",
            {"text": TEXT, "position": 1, "edits": [EDIT | {"value": 1e300}]},
            "must leave the model's predictions finite",
        ),
        ("generate", {"edits": [EDIT | {"latent": M}]}, f"latent must be in [0, {M - 1}]"),
        ("generate", {"edits": [EDIT | {"latent": None}]}, "latent must be given"),
        ("generate", {"edits": [EDIT | {"layers": [7]}]}, "layers must be among"),
        ("generate", {"edits": [EDIT | {"layers": ["a"]}]}, "layers must be a tuple of integers"),
        ("generate", {"edits": [EDIT | {"op": "<b>"}]}, "op must be add, scale, clamp or ablate"),
        ("generate", {"edits": [EDIT | {"value": None}]}, "value must be given"),
        ("generate", {"edits": [EDIT | {"positions": "2-"}]}, "positions must be"),
        ("generate", {"edits": [EDIT | {"units": "x"}]}, "units must be sigma, max, mean or raw"),
        ("generate", {"edits": [EDIT] * 33}, "at most 32 edits, got 33"),
        ("generate", {"max_new_tokens": 257}, "max_new_tokens must be in [1, 256], got 257"),
        ("generate", {"max_new_tokens": 60}, "at most 64 together"),
        ("generate", {"temperature": -1}, "temperature must be in [0, 100], got -1"),
        ("generate", {"sides": ["other"]}, "sides must be baseline and steered"),
        ("generate", {"seed": 10**30}, "seed must be an integer"),
        ("trace", {"text": TEXT, "check": 21}, "check must be in [0, 20], got 21"),
        ("trace", {"text": TEXT, "target": "two words"}, "--target must be one token"),
        ("trace", {"text": TEXT, "latent": 3}, "--at_layer must be given with --latent"),
    ],
)
def test_a_bad_request_is_told_in_a_sentence(client, path, body, words):
    body = {"text": TEXT, **body} if path == "generate" else body
    answer = client.post(
        f"/runs/0/{path}",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_a_body_that_is_no_json_or_is_declared_as_something_else_is_refused(client):
    kind = {"Content-Type": "application/json"}
    for content in ('{"text": "x", "other": NaN}', "[1]", "{", "[" * 50_000):
        assert client.post("/runs/0/prompt", content=content, headers=kind).status_code == 400
    # What a form of another site may send without asking first.
    plain = {"Content-Type": "text/plain"}
    answer = client.post("/runs/0/prompt", content='{"text": "x"}', headers=plain)
    assert answer.status_code == 400


def test_what_is_not_there_is_told(client):
    for path in ("/runs/1/", "/runs/0/data/other", "/runs/0/data/examples-99", "/nothing"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]


JSON = {"Content-Type": "application/json"}


def test_a_closed_tab_stops_and_the_next_one_has_its_turn(run, monkeypatch):
    from mlsae.app.session import Session

    generate, shown = Session.generate, []

    def slowly(self, ids, changes, sampling, show, stopped):
        def show_slowly(text, n):
            time.sleep(0.05)
            shown.append((sampling["max_new_tokens"], n))
            show(text, n)

        return generate(self, ids, changes, sampling, show_slowly, stopped)

    monkeypatch.setattr(Session, "generate", slowly)
    body = {"text": "x", "sides": ["baseline"]}
    with served(run) as (runs, port), tab(port) as first, tab(port) as second:
        asking = json.dumps(body | {"max_new_tokens": 50})
        first.request("POST", "/runs/0/generate", asking, JSON)
        with first.getresponse() as running:
            assert json.loads(running.readline())["tokens"] == 1
            asking = json.dumps(body | {"max_new_tokens": 2})
            second.request("POST", "/runs/0/generate", asking, JSON)
        first.close()
        with second.getresponse() as answer:
            assert [json.loads(line) for line in answer][-1]["done"]
        assert max(n for most, n in shown if most == 50) < 50
        assert shown[-1] == (2, 2)
        assert runs.worker.unfinished == 0


def test_streams_of_two_tabs_take_turns(run):
    with served(run) as (_, port):

        def stream(_):
            asking = json.dumps({"text": TEXT, "edits": [EDIT], "max_new_tokens": 12})
            with tab(port) as one:
                one.request("POST", "/runs/0/generate", asking, JSON)
                with one.getresponse() as answer:
                    return [json.loads(line) for line in answer]

        with ThreadPoolExecutor(2) as pool:
            one, two = pool.map(stream, range(2))
    ends = [[event for event in events if event.get("done")] for events in (one, two)]
    assert ends[0] == ends[1]
    assert [event["side"] for event in ends[0]] == ["baseline", "steered"]
    assert any("waiting" in event for event in [*one, *two])


def tab(port):
    return closing(http.client.HTTPConnection("127.0.0.1", port))


def test_a_checkpoint_without_its_lens_is_given_it(run, client, tmp_path):
    mlsae = MLSAE.from_pretrained(run)
    mlsae.about = {"released": {"tuned_lens": True}}
    mlsae.save_pretrained(tmp_path / "run")
    folder = save_tuned_lens(tmp_path / "lens", L, D, model="model")

    def ask(lens):
        app = guarded(Runs(AppConfig((tmp_path / "run",), lens=lens, device="cpu")))
        asker = TestClient(app, base_url="http://127.0.0.1:1")
        return asker.post("/runs/0/prompt", json={"text": TEXT})

    assert "--lens must be given" in ask(None).json()["error"]
    plain = client.post("/runs/0/prompt", json={"text": TEXT}).json()["entries"]
    carried = ask(folder).json()["entries"]
    assert carried["latent"]
    assert carried != plain


def test_runs_of_one_transformer_hold_it_once(run):
    runs = Runs(AppConfig((run, run), device="cpu"))
    one, two = (each.session().result().stream.reader.model for each in runs.all)
    assert one is two
