"""`python -m mlsae.analyze`: examples and geometry against brute force, and the program.

Legend: L layers, N tokens, K active latents per token, M latents, R rows, T positions.
"""

import json

import pandas
import pytest
import safetensors.torch
import torch

from mlsae.analysis.examples import AFTER, BEFORE, Examples
from mlsae.analysis.geometry import nearest_tokens, neighbors, random_cosines
from mlsae.analysis.parquet import TokenText, write_examples
from mlsae.analysis.run import AnalyzeConfig, analyze
from mlsae.cli import parse
from mlsae.errors import InputError
from mlsae.model import MLSAE, MLSAEConfig
from mlsae.training.run_dir import RUN_FILES
from sparse_topk import TopK
from tests.helpers.programs import SMALL, program

L, R, T, M, K, N_EXAMPLES = 2, 6, 20, 12, 3, 4


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The examples of random activations, updated with two rows at a time, read by pandas."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 40, (R, T), generator=generator)
    token_mask = input_ids > 3  # the first ids are special: a document ends there
    strings = [f"<{i}>" for i in range(40)]
    text = TokenText(input_ids, token_mask, strings)
    dense = torch.rand(L, R * T, M, generator=generator)
    values, indices = dense.topk(K)
    kept = torch.zeros_like(dense).scatter(2, indices, values)
    examples = Examples(M, L, N_EXAMPLES, 0, torch.device("cpu"))
    for rows in torch.arange(R * T).view(R, T).split(2):
        place = rows[token_mask[rows[0, 0] // T : rows[0, 0] // T + len(rows)]]
        codes = TopK(values[:, place], indices[:, place])
        examples.update(codes, text.segment[place], place)
    path = tmp_path_factory.mktemp("examples") / "examples.parquet"
    n = write_examples(path, examples, text)
    table = pandas.read_parquet(path)
    assert len(table) == n
    return table, kept, input_ids, token_mask


def test_the_top_examples_are_the_highest_activations(collected):
    table, kept, _, token_mask = collected
    top = table[table.kind == "top"]
    for j in range(M):
        for layer in range(L):
            h = kept[layer, token_mask.flatten(), j]
            expected = h[h > 0].sort(descending=True).values[:N_EXAMPLES].tolist()
            got = top[(top.latent == j) & (top.layer == layer)].activation.tolist()
            assert got == pytest.approx(expected)


def test_a_window_is_the_text_around_and_ends_where_its_document_ends(collected):
    table, kept, input_ids, token_mask = collected
    flat = kept.view(L, R, T, M)
    for example in table.itertuples():
        places = (flat[example.layer, :, :, example.latent] == example.activation).nonzero()
        row, at = places[0].tolist()  # random activations are all different
        first = last = at
        while first > max(0, at - BEFORE) and token_mask[row, first - 1]:
            first -= 1
        while last < min(T - 1, at + AFTER) and token_mask[row, last + 1]:
            last += 1
        assert list(example.tokens) == [f"<{i}>" for i in input_ids[row, first : last + 1]]
        assert example.position == at - first
        window = flat[example.layer, row, first : last + 1, example.latent]
        assert list(example.activations) == pytest.approx(window.tolist(), rel=1e-3, abs=1e-3)
    assert table.groupby("document").size().shape[0] > R


def test_drawn_examples_are_ordered_quarters(collected):
    table, *_ = collected
    drawn = table[table.kind != "top"]
    assert set(drawn.kind) == {"q1", "q2", "q3", "q4"}
    for _, group in drawn.groupby(["latent", "layer"]):
        assert list(group.activation) == sorted(group.activation)


def test_the_draw_is_uniform():
    """Of 40 tokens in four batches, 4 are drawn: on average, one from each batch."""
    counts = torch.zeros(40)
    place = torch.arange(40)
    codes = TopK(
        torch.ones(1, 40, 1) + place[:, None] / 100, torch.zeros(1, 40, 1, dtype=torch.int64)
    )
    for seed in range(300):
        examples = Examples(1, 1, 4, seed, torch.device("cpu"))
        for part in place.split(10):
            batch = TopK(codes.values[:, part], codes.indices[:, part])
            examples.update(batch, torch.zeros_like(part), part)
        ((_, drawn),) = examples.batches(1)
        assert len(drawn.place.unique()) == 4
        counts[drawn.place.flatten()] += 1
    assert (counts.view(4, 10).sum(1) / 300).tolist() == pytest.approx([1] * 4, abs=0.2)


def test_neighbors_and_their_control():
    W = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    near = neighbors(W)
    unit = torch.nn.functional.normalize(W.double(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    torch.testing.assert_close(near.cosine.double(), cosines.max(1).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(near.nearest, cosines.argmax(1))
    pairs = cosines[cosines > -2]
    expected = torch.histc(pairs, 200, -1, 1) / len(pairs)
    torch.testing.assert_close(near.share, expected, rtol=0, atol=1e-4)
    # These directions are random, so their cosines must match the control in closed form.
    control, mmcs = random_cosines(near.edges, 8, 300)
    assert control.sum().item() == pytest.approx(1)
    assert mmcs == pytest.approx(near.cosine.mean().item(), abs=0.01)
    assert (control.cumsum(0) - near.share.cumsum(0)).abs().max().item() < 0.01


def test_nearest_tokens_are_those_of_the_centered_embedding():
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(50, 8, generator=generator) + 30  # a large common mean
    W = (E - E.mean(0))[[7, 3]] * 2
    nearest = nearest_tokens(W, E, 2)
    assert nearest.tokens[:, 0].tolist() == [7, 3]
    assert nearest.cosine[:, 0].tolist() == pytest.approx([1, 1], abs=1e-5)


def test_the_program(tmp_path):
    run = tmp_path / "run"
    assert program(*SMALL, "--out", run).returncode == 0
    small = ["--tokens", 512, "--seq_len", 64, "--resamples", 50, "--examples", 2]
    result = program(run, *small, module="mlsae.analyze")
    assert result.returncode == 0, result.stderr
    about = json.loads((run / "analysis.json").read_text())
    trained = safetensors.torch.load_file(run / "latents.safetensors")
    arrays = safetensors.torch.load_file(run / "analysis.safetensors")
    # The training validated on the same text, so the counts are the same.
    assert torch.equal(arrays["counts"], trained["counts"])
    torch.testing.assert_close(arrays["totals"].float(), trained["totals"], rtol=1e-4, atol=1e-4)
    latents = pandas.read_parquet(run / "analysis_latents.parquet")
    assert len(latents) == about["n_latents"] == 384
    assert latents.tokens_active.tolist() == arrays["tokens_active"].tolist()
    active = latents[latents.tokens_active > 0]
    assert len(active) == about["active_latents"]
    ratios = about["ratios"]["equations"]
    assert active.var_layer.mean() == pytest.approx(ratios["var_given_latent"])
    assert active.var_within_token.mean() == pytest.approx(ratios["var_given_latent_token"])
    assert active.entropy.mean() == pytest.approx(about["entropy"]["profile"]["value"], abs=1e-6)
    assert ratios["A"]["low"] < ratios["A"]["value"] < ratios["A"]["high"]
    assert f"{ratios['A']['value']:.4f}" in result.stdout
    assert all(len(tokens) == 5 for tokens in latents.tokens_in)
    examples = pandas.read_parquet(run / "analysis_examples.parquet")
    assert len(examples) == about["examples"] > 0
    assert examples.activation.max() == pytest.approx(latents.max_activation.max())

    before = (run / "analysis.json").read_bytes()
    result = program(run, "--prompt", "def main(argv):", "--seq_len", 64, module="mlsae.analyze")
    assert result.returncode == 0, result.stderr
    assert (run / "analysis.json").read_bytes() == before
    reading = json.loads((run / "analysis_prompt.json").read_text())
    assert reading["prompt"] == "".join(reading["tokens"]) == "def main(argv):"
    entries = reading["entries"]
    assert set(entries["token"]) == set(range(len(reading["tokens"])))
    assert set(entries["layer"]) == set(range(6))
    page = (run / "prompt.html").read_text()
    assert "<script src=" not in page
    assert "def main(argv):" in page


def test_bad_input_is_named(tmp_path):
    MLSAE(MLSAEConfig(192, 384, 4, (0, 1), model="builtin")).save_pretrained(tmp_path)
    for arguments, message in (
        (["--examples", "-1"], "--examples must be at least 0, got -1"),
        (["--groups", "0"], "--groups must be at least 1, got 0"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        ([], "DATASET must be given"),
    ):
        with pytest.raises(InputError, match=message):
            analyze(parse(AnalyzeConfig, "", [str(tmp_path), *arguments], "analyze"))


def test_the_files_belong_to_a_run():
    """Otherwise --overwrite would refuse a run that has been analyzed."""
    names = ("json", "safetensors")
    tables = ("latents.parquet", "examples.parquet", "prompt.json")
    written = {f"analysis.{x}" for x in names} | {f"analysis_{x}" for x in tables}
    assert written | {"prompt.html"} <= set(RUN_FILES)
