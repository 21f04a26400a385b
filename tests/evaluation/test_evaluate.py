"""`python -m mlsae.evaluate`: SAEs with known metrics, and a dense oracle.

Legend: R rows, T positions, D width of the residual stream.
"""

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F

from mlsae import MLSAE, MLSAEConfig, metrics
from mlsae.cli import parse
from mlsae.data.residuals import ResidualReader
from mlsae.errors import InputError
from mlsae.evaluation.faithfulness import measure_faithfulness
from mlsae.evaluation.run import EvaluateConfig, evaluate
from mlsae.evaluation.token_metrics import (
    TokenSums,
    bootstrap_token_metrics,
    compute_token_metrics,
)
from mlsae.training.run_dir import RUN_FILES
from tests.helpers.models import CONFIGS, forward_with_hook, make
from tests.helpers.programs import SMALL, program

R, T, D = 5, 12, 24


@pytest.fixture(scope="module")
def model():
    return make(CONFIGS["gpt_neox"])


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 64, (R, T), generator=generator)
    return input_ids, input_ids > 5  # the first six ids are special


def perfect_sae():
    """Latents are ±1 times each dimension, those of the right sign active: x̂ = x, bit for bit."""
    mlsae = MLSAE(MLSAEConfig(D, 2 * D, D, (0, 1, 2), standardize=False))
    signs = torch.cat([torch.eye(D), -torch.eye(D)])
    mlsae.sae.load_state_dict({"W_enc": signs, "W_dec": signs, "b_dec": torch.zeros(D)})
    return mlsae


def constant_sae(vector):
    """With weights 0 no latent is active, so x̂ = b_pre = `vector`."""
    mlsae = MLSAE(MLSAEConfig(D, 8, 2, (1,), standardize=False))
    zeros = torch.zeros(8, D)
    mlsae.sae.load_state_dict({"W_enc": zeros, "W_dec": zeros, "b_dec": vector})
    return mlsae


def measure(mlsae, model, text, layers=None, micro_rows=2, joint="from"):
    reader = ResidualReader(model, layers)
    measured = measure_faithfulness(mlsae, reader, *text, micro_rows, joint=joint)
    ones = torch.ones(1, R, dtype=torch.float64)
    return measured, compute_token_metrics(measured.sums, ones)


def test_a_perfect_sae_costs_nothing(model, text):
    measured, computed = measure(perfect_sae(), model, text)
    zeros = ("fvu", "mse", "delta_ce", "kl", "delta_ce_from", "kl_from")
    ones = ("top1", "recovered_zero", "recovered_mean", "top1_from", "recovered_from")
    for name, value in [*((name, 0) for name in zeros), *((name, 1) for name in ones)]:
        assert getattr(computed, name).tolist() == [[value] * 3], name
    # D principal components explain everything, too.
    torch.testing.assert_close(measured.pca, torch.ones(3, dtype=torch.float64))


def test_an_sae_with_weights_zero_is_the_mean_ablation(model, text):
    input_ids, token_mask = text
    mean = ResidualReader(model, [1])(input_ids)[0][token_mask].mean(0)
    measured, computed = measure(constant_sae(mean), model, text, [1])
    torch.testing.assert_close(measured.sums.ce, measured.sums.ce_mean)
    assert computed.recovered_mean.item() == pytest.approx(0, abs=1e-5)
    assert computed.fvu.item() == pytest.approx(1)
    assert computed.l0.item() == 0
    assert not measured.active.any()
    assert computed.delta_ce.item() != 0
    measured, computed = measure(constant_sae(torch.zeros(D)), model, text, [1])
    assert computed.recovered_zero.item() == pytest.approx(0, abs=1e-5)


def test_every_metric_against_a_dense_oracle(model, text):
    """At every layer, in float64 and with hooks by hand; the MLSAE's own layer is layer 1."""
    torch.manual_seed(2)
    mlsae = MLSAE(MLSAEConfig(D, 40, 4, (1,)))
    measured, computed = measure(mlsae, model, text)
    input_ids, token_mask = text
    predicted = token_mask[:, :-1] & token_mask[:, 1:]
    targets = input_ids[:, 1:][predicted]
    true = model(input_ids=input_ids).logits[:, :-1][predicted].double()
    residuals = ResidualReader(model)(input_ids)
    for layer, x in enumerate(residuals):
        x_hat = torch.where(token_mask[..., None], mlsae(x), x)
        a, b = x[token_mask].double(), x_hat[token_mask].double()
        error = (a - b).square().sum()
        h = mlsae.encode(x[token_mask]).values
        logits = forward_with_hook(model, input_ids, layer, x_hat)[:, :-1][predicted].double()
        zero = torch.where(token_mask[..., None], 0, x)
        ablated = forward_with_hook(model, input_ids, layer, zero)[:, :-1][predicted].double()
        ce, ce_true, ce_zero = (F.cross_entropy(y, targets) for y in (logits, true, ablated))
        centered = a - a.mean(0)
        oracle = {
            "fvu": error / centered.square().sum(),
            "fvu_paper": error / (a - a.mean()).square().sum(),
            "mse": (a - b).square().mean(),
            "l0": (h > 0).double().sum(1).mean(),
            "l1": h.double().sum(1).mean(),
            "delta_ce": ce - ce_true,
            "recovered_zero": 1 - (ce - ce_true) / (ce_zero - ce_true),
            "kl": F.kl_div(logits.log_softmax(1), true.softmax(1), reduction="batchmean"),
            "top1": (logits.argmax(1) == true.argmax(1)).double().mean(),
        }
        for name, value in oracle.items():
            got = getattr(computed, name)[0, layer].item()
            assert got == pytest.approx(value.item(), rel=1e-4, abs=1e-6), (name, layer)
        singular = torch.linalg.svdvals(centered).square()
        assert measured.pca[layer].item() == pytest.approx(
            (singular[:4].sum() / singular.sum()).item()
        )


def test_the_split_into_batches_changes_nothing(model, text):
    torch.manual_seed(2)
    mlsae = MLSAE(MLSAEConfig(D, 40, 4, (0, 1, 2)))
    (once, whole), (split, parts) = (measure(mlsae, model, text, micro_rows=n) for n in (R, 2))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(once.pca, split.pca)
    assert torch.equal(once.active, split.active)


def test_weights_repeat_rows(model, text):
    """Row r counted weights[r] times gives the metrics of a text that repeats it so often."""
    torch.manual_seed(2)
    mlsae = MLSAE(MLSAEConfig(D, 40, 4, (0, 1, 2)))
    measured, _ = measure(mlsae, model, text)
    drawn = torch.tensor([0, 0, 3, 4, 4])
    weights = torch.bincount(drawn, minlength=R).double()[None]
    resampled = compute_token_metrics(measured.sums, weights)
    _, direct = measure(mlsae, model, tuple(part[drawn] for part in text))
    for name, a, b in zip(direct._fields, resampled, direct, strict=True):
        # Their ablation keeps the mean of the whole text.
        if name not in ("recovered_mean", "recovered_from"):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_the_interval_of_a_mean_of_normal_numbers():
    sums = TokenSums(400, 1, 2, torch.device("cpu"))
    sums.tokens += 1
    sums.l1 += torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, low, high = bootstrap_token_metrics(sums, resamples=2000, seed=0)["l1"]
    spread = 1.96 * sums.l1.std().item() / 400**0.5
    assert (value - low)[0].item() == pytest.approx(spread, rel=0.1)
    assert (high - value)[0].item() == pytest.approx(spread, rel=0.1)


def test_recovered_in_closed_form():
    true, ablated = torch.tensor(2.0), torch.tensor(6.0)
    assert metrics.ce_recovered(true, torch.tensor(3.0), ablated).item() == 0.75


def test_the_program(tmp_path):
    """A single-layer SAE: at its own layer, then at another one too, in another folder."""
    one = tmp_path / "one"
    result = program(*SMALL, "--layers", 3, "--out", one)
    assert result.returncode == 0, result.stderr
    small = ["--tokens", 512, "--seq_len", 64, "--resamples", 50]
    result = program(one, *small, module="mlsae.evaluate")
    assert result.returncode == 0, result.stderr
    content = json.loads((one / "evaluation.json").read_text())
    last = json.loads((one / "metrics.jsonl").read_text().splitlines()[-1])["heldout"]
    assert content["layers"] == [3]
    assert content["tokens"] == last["n_tokens"]
    for name in ("fvu", "fvu_paper", "l0"):
        assert content["figures"][name]["mean"] == pytest.approx(last[name], rel=1e-4)
    (low, high), value = (content["figures"]["kl"][key] for key in ("mean_interval", "mean"))
    assert 0 < low < value < high
    assert content["figures"]["dead"]["mean_interval"] == [None, None]
    assert f"{value:.3f}" in result.stdout
    elsewhere = tmp_path / "elsewhere"
    result = program(
        one, *small, "--layers", 1, 3, "--out", elsewhere, module="mlsae.evaluate"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with (elsewhere / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["1", "3", "mean"]
    assert float(rows[1]["fvu"]) == pytest.approx(content["figures"]["fvu"]["mean"], rel=1e-6)
    assert float(rows[0]["fvu"]) > float(rows[1]["fvu"])
    assert math.isclose(float(rows[2]["kl"]), (float(rows[0]["kl"]) + float(rows[1]["kl"])) / 2)


def test_bad_input_is_named(tmp_path):
    folder = tmp_path / "run"
    narrow = MLSAE(MLSAEConfig(8, 16, 2, (0,), model="builtin"))
    narrow.save_pretrained(folder)
    for arguments, message in (
        ([tmp_path / "none"], "RUN must be the folder of a trained MLSAE"),
        ([folder, "--tokens", 0], "--tokens must be at least 1, got 0"),
        ([folder], "DATASET must be given"),
        ([folder, "builtin", "--layers", 6], r"--layers must be in \[0, 5\]"),
        ([folder, "builtin"], "MODEL must have a residual stream of width 8, .* builtin has 192"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(parse(EvaluateConfig, "", list(map(str, arguments)), "evaluate"))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}


def test_the_files_belong_to_a_run():
    """Otherwise --overwrite would refuse a run that has been evaluated."""
    assert {"evaluation.csv", "evaluation.json"} <= set(RUN_FILES)
