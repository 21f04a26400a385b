"""`trace` and `python -m mlsae.trace`: what is named, refused, printed and written.

Legend: T tokens, D width of the residual stream, M latents.
"""

import base64
import copy
import gzip
import json
import re

import pytest
import torch

from mlsae import MLSAE, MLSAEConfig
from mlsae.attribution import LogitTarget, memory, trace
from mlsae.attribution.command_line import TraceConfig
from mlsae.attribution.memory import estimate
from mlsae.cli import parse
from mlsae.data.residuals import ResidualReader
from mlsae.errors import InputError
from mlsae.intervention import Edit, OpenConfig, intervene, open_run
from mlsae.report.trace_page import trace_page
from mlsae.trace import trace_and_print
from tests.helpers.models import CONFIGS, make, save_gpt2

D, M, K = 32, 48, 4
PROMPT = "def main(<b>):"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with an untrained MLSAE of a random model."""
    root = tmp_path_factory.mktemp("trace")
    model = save_gpt2(root / "model")
    torch.manual_seed(0)
    MLSAE(MLSAEConfig(D, M, K, (0, 1), model=model)).save_pretrained(root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def opened(run):
    return open_run(OpenConfig(run=run))


def test_the_target_is_the_likeliest_token_or_the_one_that_is_named(opened):
    ids = opened.tokenize(PROMPT)
    with torch.no_grad():
        logits = opened.reader.logits(ids[None])[0, -1]
    found = trace(opened, PROMPT, check=0)
    assert found.target == LogitTarget(int(logits.argmax()), None)
    assert found.attribution.value == pytest.approx((logits.max() - logits.mean()).item(), rel=1e-4)
    one, other = (opened.tokenizer(text)["input_ids"][0] for text in (" return", " self"))
    named = trace(opened, PROMPT, target=" return", against=" self", check=0)
    assert named.name == "logit of ' return' − logit of ' self'"
    expected = (logits[one] - logits[other]).item()
    assert named.attribution.value == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert "".join(named.tokens) == PROMPT


def test_a_latent_s_text_ends_at_its_token(opened):
    ids = opened.tokenize(PROMPT)
    values, indices = opened.mlsae.encode(opened.reader(ids[None])[1, 0])  # (T, K)
    latent, h = int(indices[2, 0]), values[2, 0].item()
    found = trace(opened, PROMPT, latent=latent, at_layer=1, at_token=2 - len(ids))
    assert len(found.tokens) == 3
    assert found.layers == [0]
    assert found.attribution.value == pytest.approx(h, rel=1e-5)
    assert set(found.attribution.nodes.layer.tolist()) == {0}
    inactive = next(j for j in range(M) if j not in indices[2])
    with pytest.raises(
        InputError, match=rf"{inactive} is not; the most active there are .*{latent}"
    ):
        trace(opened, PROMPT, latent=inactive, at_layer=1, at_token=2)


def test_a_check_is_what_steering_would_do(opened):
    found = trace(opened, PROMPT, check=4)
    assert [check.latent is None for check in found.checks] == [False] * 4 + [True] * 4
    check, target = found.checks[0], found.target.token
    edit = Edit(check.latent, (check.layer,), "ablate", positions=(check.token,))
    inputs = torch.tensor(found.ids)[None]
    with torch.no_grad(), intervene(opened.reader.model, opened.mlsae, [edit]):
        logits = opened.reader.model(input_ids=inputs).logits[0, -1]
    expected = found.attribution.value - (logits[target] - logits.mean()).item()
    assert check.ablation == pytest.approx(expected, abs=1e-4)


def test_flows_and_json_hold_every_node_once(opened):
    found = trace(opened, PROMPT, check=3, edges=5)
    nodes = found.attribution.nodes
    flows = found.flows()
    assert sum(len(flow.layers) for flow in flows) == len(nodes.token)
    assert all(flow.layers == sorted(flow.layers) for flow in flows)
    strengths = [flow.strength for flow in flows]
    assert strengths == sorted(strengths, reverse=True)
    content = json.loads(json.dumps(found.as_dict(n_nodes=7, n_flows=2)))
    assert content["flows"] == [flow._asdict() for flow in flows[:2]]
    assert content["nodes"]["attribution"] == pytest.approx(nodes.attribution[:7].tolist())
    assert content["n_nodes"] == len(nodes.token)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": " zyxwv qq"}, "--target must be one token of the model, and ' zyxwv qq' is"),
        ({"target": ""}, "--target must be one token of the model, and '' is 0"),
        ({"target": " self", "against": " self"}, "--against must be another token"),
        ({"latent": 3}, "--at_layer must be given with --latent, one of 1"),
        ({"latent": 3, "at_layer": 0}, r"--at_layer must be .* has one below it \(1\), got 0"),
        ({"latent": 48, "at_layer": 1}, r"--latent must be in \[0, 47\], got 48"),
        ({"latent": 3, "at_layer": 1, "at_token": 99}, r"--at_token must be in \[-\d+, \d+\]"),
        ({"latent": 3, "at_layer": 1, "target": " x"}, "must be left out with --latent"),
        ({"at_layer": 1}, "--at_layer and --at_token must come with --latent"),
        ({"check": -1}, "--check must be at least 0, got -1"),
        ({"edges": -1}, "--edges must be at least 0, got -1"),
        ({"prompt": "x " * 99}, r"--prompt must have at most 64 tokens \(the model's context\)"),
        ({"prompt": ""}, "--prompt must have at least one token"),
    ],
)
def test_what_cannot_be_traced_is_named(opened, arguments, message):
    with pytest.raises(InputError, match=message):
        trace(opened, **{"prompt": PROMPT} | arguments)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_what_a_pass_keeps_is_known_from_two_short_ones(family):
    """gemma2 computes its attention without a fused kernel, so it keeps T² weights."""
    config = type(CONFIGS[family]).from_dict(
        {**CONFIGS[family].to_dict(), "max_position_embeddings": 256, "n_positions": 256}
    )
    reader = ResidualReader(make(config))
    mlsae = MLSAE(MLSAEConfig(24, M, K, (0, 1, 2)))
    ids = torch.arange(200) % 64
    counted = memory._kept_bytes(reader, ids) * 4 / 3  # and a block's again, of three
    assert estimate(mlsae, reader, ids).activations == pytest.approx(counted, rel=0.05)
    assert not estimate(mlsae, reader, ids[:1]).activations > counted / 100


def test_a_trace_that_does_not_fit_is_refused_before_its_pass(opened, run, monkeypatch):
    lines = []
    monkeypatch.setattr(memory, "available", lambda _: 5000)
    with pytest.raises(
        InputError, match=r"--prompt has \d+ tokens, .* and 0 MB is free; give a sh"
    ):
        trace(opened, PROMPT, tell=lines.append)
    assert re.match(r"memory beside the weights' .* activations .*, latents", lines[0])
    with pytest.raises(InputError, match=r"weights of about .* is free on cpu"):
        trace_and_print(TraceConfig(run=run, prompt=PROMPT))


def test_numbers_that_are_not_finite_are_refused(opened):
    model, mlsae = copy.deepcopy(opened.reader.model), copy.deepcopy(opened.mlsae)
    for damaged in (model.lm_head, mlsae.sae):
        next(damaged.parameters()).data.fill_(torch.nan)
    for damaged in ({"reader": ResidualReader(model, (0, 1))}, {"mlsae": mlsae}):
        with pytest.raises(InputError, match="must give finite predictions and attributions"):
            trace(opened._replace(**damaged), PROMPT)


def test_everything_is_printed_and_written(run, tmp_path, capsys):
    save, page = tmp_path / "new" / "trace.json", tmp_path / "trace.html"
    arguments = ["--prompt", PROMPT, "--edges", "6", "--save", str(save), "--page", str(page)]
    trace_and_print(parse(TraceConfig, "", [str(run), *arguments], "trace"))
    printed = capsys.readouterr().out
    for shown in ("memory beside", "mean of all logits = ", "Latents along the layers",
                  "Attributions of a layer", "The strongest latents", "The strongest errors",
                  "correlation of attribution and ablation, of 10 latents", "What rests on what",
                  "saved: "):  # fmt: skip
        assert shown in printed
    content = json.loads(save.read_text())
    assert len(content["errors"]) == 2
    assert content["n_nodes"] == len(content["nodes"]["token"])
    text = page.read_text()
    assert ">&lt;</span>" in text
    packed = re.search(r'id="packed-plots">([^<]*)<', text)[1]
    plots = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert "&lt;" in plots["errors"]["layout"]["xaxis"]["ticktext"]  # plotly reads tags
    with pytest.raises(InputError, match="--save and --page must be two files"):
        trace_and_print(TraceConfig(run=run, prompt=PROMPT, save=page, page=page))


def test_the_page_opens_wide_and_narrow_without_a_complaint(opened, tmp_path):
    pytest.importorskip("selenium", reason="needs selenium, which drives the browser")
    from tests.helpers.headless import CHROMIUM, DRIVER, NARROW, WIDE, Reader

    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium and its driver")
    page = tmp_path / "trace.html"
    page.write_bytes(trace_page(trace(opened, PROMPT, edges=4).as_dict(), "a run"))
    reader = Reader(tmp_path / "profile")
    try:
        for size in (WIDE, NARROW):
            reader.open(page, size)
            reader.until("document.querySelector('[data-plot=flows] .point') !== null")
            width = reader.js("return document.documentElement.scrollWidth")
            assert width <= size[0], "the page scrolls sideways"
        assert reader.texts(".whole .chip") == ["def", "·main", "(", "<", "b", ">", "):"]
        assert reader.complaints() == []
    finally:
        reader.driver.quit()
