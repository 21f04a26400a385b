"""A model with a massive first position: trained, resumed, evaluated and analyzed without it.

Legend: L layers, N tokens, D width of the residual stream.
"""

import json
import shutil
from dataclasses import replace
from itertools import islice

import pytest
import safetensors.torch
import torch

from mlsae import MLSAE, builtin, metrics
from mlsae.analysis.run import AnalyzeConfig, analyze, show_prompt
from mlsae.cli import parse
from mlsae.compare import compare
from mlsae.config import SAEConfig, SAESweep, TrainArguments, TrainConfig
from mlsae.data.config import DataConfig
from mlsae.data.sinks import DropRule
from mlsae.data.stream import DataStream, read_shape
from mlsae.errors import InputError
from mlsae.evaluation.run import EvaluateConfig, evaluate
from mlsae.report import write_report
from mlsae.training.loop import train_step
from mlsae.training.run import train
from mlsae.training.validation import validate
from tests.helpers.models import save_gpt2
from tests.helpers.parts import unmasked
from tests.training.test_step import make as make_state

T = 64
_TEXT = 300_000  # characters: 32 held-out rows and more
SETTINGS = {
    "sae": SAEConfig(expansion=4, k=8), "tokens": 12_000, "batch_tokens": 512,
    "checkpoint_tokens": 2000, "eval_tokens": 2048,
}  # fmt: skip
SMALL = {"tokens": 2048, "resamples": 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sinks")
    save_gpt2(root / "plain")
    save_gpt2(root / "massive", massive=50)
    code = "".join(islice(builtin.corpus("train"), 60))[:_TEXT]
    records = [{"text": code[i : i + 1000]} for i in range(0, len(code), 1000)]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    return root


def settings(root, model="massive", out="run", **drops):
    data = DataConfig(str(root / model), str(root / "text.jsonl"), **drops)
    return TrainConfig(data, out=root / out, **SETTINGS)


@pytest.fixture(scope="module")
def run(root):
    config = settings(root)
    train(config)
    return config


def saved(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def elsewhere(sae, config):
    """By definition, in float64: FVU of all positions but the first, and of all; (L,) each."""
    stream = DataStream(config.data, read_shape(config.data), torch.device("cpu"), micro_rows=8)
    ids = stream.heldout(SETTINGS["eval_tokens"])
    keep = ~torch.isin(ids, torch.tensor(stream.tokenizer.all_special_ids))
    rest = keep.clone()
    rest[:, 0] = False
    residuals = stream.reader(ids)
    fvu = []
    for mask in (rest, keep):
        x = residuals[:, mask]
        error = (x.double() - sae(x).double()).square().sum((1, 2))
        fvu.append(error / (x - x.mean(1, keepdim=True)).double().square().sum((1, 2)))
    return fvu, rest


def test_the_rest_is_trained_as_without_it_and_both_figures_are_reported(root, run):
    (rest, everything), mask = elsewhere(MLSAE.from_pretrained(run.out).requires_grad_(False), run)
    heldout = saved(run.out)["heldout"]
    assert heldout["fvu_layers"] == pytest.approx(rest.tolist(), rel=1e-4)
    assert heldout["fvu_all_layers"] == pytest.approx(everything.tolist(), rel=1e-3)
    assert (heldout["n_tokens"], heldout["n_dropped"]) == (mask.sum(), 32)
    plain = settings(root, "plain", "plain-run")
    train(plain)
    normal = saved(plain.out)
    assert normal["dropped"] == DropRule().as_dict(), "nothing is massive there"
    assert "fvu_all" not in normal["heldout"]
    assert heldout["fvu"] == pytest.approx(normal["heldout"]["fvu"], rel=0.1)
    kept = settings(root, out="kept", drop_norm="off")
    train(kept)
    (rest, _), _ = elsewhere(MLSAE.from_pretrained(kept.out).requires_grad_(False), kept)
    assert saved(kept.out)["heldout"]["fvu"] < 0.5 * rest.mean(), "what the rule is for"


def test_it_is_said_in_a_line(root, capsys):
    config = replace(settings(root, out="said"), tokens=600)
    train(config)
    output = capsys.readouterr()
    assert "position 0 (8 of 8). They are dropped at all layers (1 per row)" in output.err
    assert "32 more left out" in output.out
    assert "FVU with tokens left out" in output.out
    train(replace(config, data=replace(config.data, drop_norm="off"), overwrite=True))
    output = capsys.readouterr()
    assert "They are kept (1 per row); drop them with --drop_norm 10" in output.err
    assert "1 % of the vectors carry" in output.out


def test_resuming_keeps_the_medians(root, run):
    """From a checkpoint in the middle, to the same bits and the same rule."""
    out = root / "resumed"
    shutil.copytree(run.out, out)
    newest = max((out / "checkpoints").glob("*.safetensors"))
    newest.unlink()
    newest.with_suffix(".sha256").unlink()
    (out / "model.safetensors").unlink()
    train(replace(run, out=out, resume=True))
    for name in ("model.safetensors", "latents.safetensors"):
        assert (out / name).read_bytes() == (run.out / name).read_bytes()
    assert saved(out)["dropped"] == saved(run.out)["dropped"]
    for data, message in (
        (replace(run.data, drop_norm="off"), "--drop_norm must be auto to resume"),
        (replace(run.data, drop_positions=(0,)), "--drop_positions must be"),
    ):
        with pytest.raises(InputError, match=message):
            train(replace(run, out=out, resume=True, data=data))


def test_tokens_are_counted_before_norms_are_known(run):
    """What is dropped by norm counts as progress; by position it does not."""
    lines = (run.out / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["tokens"] / first["steps"] > 8 * T - 8


def test_a_step_without_some_vectors_is_the_step_of_the_rest():
    """The loss is a constant factor smaller, whatever the parts, which Adam does not see; the
    counters go on by all tokens."""
    x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(1))
    whole, parts, rest = make_state(), make_state(), make_state()
    losses = []
    for state, pieces, n in ((whole, [x], 80), (parts, x.split(10, 1), 80), (rest, [x], 64)):
        state.schedule = lambda _: 1e-3
        (step,) = train_step([state], map(unmasked, pieces), n)
        assert state.tokens == n
        losses.append(step.loss.item())
    assert losses[0] == pytest.approx(losses[1]) == pytest.approx(losses[2] * 64 / 80)
    torch.testing.assert_close(whole.mlsae.sae.W_enc, parts.mlsae.sae.W_enc)
    torch.testing.assert_close(whole.mlsae.sae.W_enc, rest.mlsae.sae.W_enc, rtol=1e-4, atol=1e-6)


def test_evaluation_follows_the_run_and_can_be_told_otherwise(root, run):
    config = EvaluateConfig(run.out, out=root / "evaluated", **SMALL)
    own = evaluate(config)
    heldout = saved(run.out)["heldout"]
    assert own.provenance.dropped == saved(run.out)["dropped"]
    assert (own.provenance.tokens, own.provenance.tokens_dropped) == (heldout["n_tokens"], 32)
    for name in ("fvu", "fvu_paper", "l0", "fvu_all"):
        assert own.metrics[name].value[-1].item() == pytest.approx(heldout[name], rel=1e-3), name
    share = own.metrics["top_share"].value[-1].item()
    assert share == pytest.approx(heldout["top_share"], rel=0.05), "about means of other rows"
    everything = evaluate(replace(config, drop_norm="off"))
    assert everything.provenance.tokens == own.provenance.tokens + 32
    assert "fvu_all" not in everything.metrics
    torch.testing.assert_close(
        everything.metrics["fvu"].value, own.metrics["fvu_all"].value, rtol=1e-3, atol=0
    )
    assert any("1 % of the vectors carry" in note for note in everything.notes())
    assert own.notes() == [
        "left out beside special tokens: norms above 10 × the median of their layer"
    ]
    # By position instead: the same tokens.
    position = evaluate(replace(config, drop_norm="off", drop_positions=(0,)))
    assert position.provenance.tokens == own.provenance.tokens
    torch.testing.assert_close(position.metrics["fvu"].value, own.metrics["fvu"].value)
    torch.testing.assert_close(position.metrics["delta_ce"].value, own.metrics["delta_ce"].value)
    again = evaluate(replace(config, drop_norm=20.0))
    assert again.provenance.dropped["norm"] == 20
    assert again.provenance.tokens == own.provenance.tokens


def test_dropped_tokens_stay_true_in_substitutions(root, run):
    """An SAE that reconstructs nothing but zeros costs what zeros cost at the other positions."""
    out = root / "zeros"
    zeros = MLSAE.from_pretrained(run.out)
    with torch.no_grad():
        for weight in zeros.sae.parameters():
            weight.zero_()
    zeros.config = replace(zeros.config, standardize=False)
    zeros.save_pretrained(out, **zeros.about)
    result = evaluate(EvaluateConfig(out, **SMALL))
    assert result.metrics["recovered_zero"].value.abs().max() < 1e-3
    x = DataStream(run.data, read_shape(run.data), torch.device("cpu"), micro_rows=8)
    assert result.provenance.tokens < x.count(x.heldout(2048))


def test_analysis_counts_kept_tokens_only(root, run):
    config = AnalyzeConfig(run.out, out=root / "analyzed", examples=1, **SMALL)
    own = analyze(config)
    heldout = saved(run.out)["heldout"]
    assert own.provenance.tokens == heldout["n_tokens"]
    counts = safetensors.torch.load_file(root / "analyzed" / "analysis.safetensors")["counts"]
    validated = safetensors.torch.load_file(run.out / "latents.safetensors")["counts"]
    assert torch.equal(counts, validated)
    reading = saved(root / "analyzed", "analysis_prompt.json")
    assert 0 not in reading["entries"]["token"]
    assert analyze(replace(config, drop_norm="off")).provenance.tokens == own.provenance.tokens + 32
    show_prompt(config, "def main(self):")
    reading = saved(root / "analyzed", "analysis_prompt.json")
    assert set(reading["entries"]["token"]) == set(range(1, len(reading["tokens"])))


def test_runs_from_before_are_evaluated_as_before(root, run):
    """Their config.json says nothing of what is dropped; nothing is."""
    out = root / "old"
    shutil.copytree(run.out, out, ignore=shutil.ignore_patterns("checkpoints"))
    config = saved(out)
    del config["dropped"]
    for name in ("drop_norm", "drop_positions", "drop_tokens"):
        del config["training"][name]
    for name in [name for name in config["heldout"] if "all" in name or "top" in name]:
        del config["heldout"][name]
    (out / "config.json").write_text(json.dumps(config))
    result = evaluate(EvaluateConfig(out, **SMALL))
    assert result.provenance.tokens_dropped == 0
    assert result.provenance.dropped == DropRule().as_dict()
    write_report(out)


def test_other_layers_measure_medians_of_their_own(root):
    config = replace(settings(root, out="one"), tokens=600)
    config = replace(config, data=replace(config.data, layers=(1,)))
    train(config)
    assert len(saved(config.out)["dropped"]["medians"]) == 1
    result = evaluate(EvaluateConfig(config.out, layers=(0, 1), **SMALL))
    assert len(result.provenance.dropped["medians"]) == 2
    assert result.provenance.tokens_dropped == 32


def test_what_is_massive_at_one_layer_is_left_out_at_all(root):
    """So a comparison measures the SAE of a layer that has nothing massive on the same tokens."""
    save_gpt2(root / "late", massive=50, late=True)
    config = settings(root, "late", "compared")
    results = compare(replace(config, tokens=600))
    assert saved(config.out / "layer-0")["dropped"]["norm"] is None
    assert saved(config.out / "layer-1")["dropped"]["norm"] == 10
    assert {result.provenance.tokens_dropped for result in results.values()} == {32}
    assert len({result.provenance.tokens for result in results.values()}) == 1


def test_several_saes_share_the_rule(root):
    sae = SAESweep(expansion=(2, 3), k=(8,))
    options = {name: value for name, value in SETTINGS.items() if name != "sae"} | {"tokens": 600}
    data = DataConfig(
        str(root / "massive"), str(root / "text.jsonl"), drop_positions=(0,), drop_tokens=(" self",)
    )
    train(*TrainArguments(data, sae=sae, out=root / "sweep", **options).configs())
    rules = [saved(root / "sweep" / name)["dropped"] for name in ("x2-k8", "x3-k8")]
    assert rules[0] == rules[1]
    assert rules[0]["positions"] == [0]
    assert len(rules[0]["tokens"]) == 1
    assert rules[0]["norm"] is None
    assert (root / "sweep" / "runs.csv").read_text().splitlines()[0].count("fvu_all") == 1


def test_bad_ratios_are_refused(root, run):
    for ratio in ("1", "0", "-3", "nan", "inf"):
        with pytest.raises(InputError, match="--drop_norm must be greater than 1"):
            train(settings(root, out="none", drop_norm=float(ratio)))
    assert not (root / "none").exists()
    config = parse(
        EvaluateConfig, "", [str(run.out), "--drop_positions", "--drop_norm", "1"], "evaluate"
    )
    assert config.drop_positions == ()
    with pytest.raises(InputError, match="--drop_norm must be greater than 1"):
        evaluate(config)


def test_validation_tells_kept_from_dropped():
    state = make_state()
    x = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(1))
    dropped = 50 * torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(2))
    parts = [(x[:, :200], dropped[:, :3]), (x[:, 200:], dropped[:, 3:])]
    (validation,) = validate([state.mlsae], parts)
    (alone,) = validate([state.mlsae], [(x, x[:, :0])])
    (together,) = validate([state.mlsae], [(torch.cat([x, dropped], 1), x[:, :0])])
    assert (validation.n_tokens, validation.n_dropped) == (300, 7)
    torch.testing.assert_close(validation.fvu, alone.fvu)
    torch.testing.assert_close(validation.fvu_all, together.fvu)
    assert torch.equal(validation.counts, alone.counts)
    expected = metrics.top_share((x - x.mean(1, keepdim=True)).square().sum(-1))
    torch.testing.assert_close(alone.top_share, expected)
    assert "fvu_all" not in alone.as_dict()
