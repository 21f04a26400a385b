"""`python -m mlsae.train`, as a user runs it."""

import json
import resource

import pytest
import safetensors.torch
import torch

from mlsae import MLSAE, builtin
from mlsae.config import learning_rate
from mlsae.train import parse
from tests.helpers.programs import SMALL, program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    result = program(*SMALL, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_run_stands_alone(run):
    folder, result = run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "latents.safetensors", "metrics.jsonl", "report.html",
        "README.md", "checkpoints",
    }  # fmt: skip
    mlsae = MLSAE.from_pretrained(folder)
    assert (mlsae.config.d_in, mlsae.config.n_latents, mlsae.config.k) == (192, 384, 8)
    assert mlsae.config.layers == (0, 1, 2, 3, 4, 5)
    torch.testing.assert_close(mlsae.sae.W_dec.norm(dim=1), torch.ones(384))
    *lines, last = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["tokens"] for line in lines] == sorted(line["tokens"] for line in lines)
    assert 4000 <= lines[-1]["tokens"] < 4000 + 512
    for line in lines:
        assert len(line["fvu_layers"]) == 6
        assert line["fvu"] == pytest.approx(sum(line["fvu_layers"]) / 6)
        assert line["tokens_per_second"] > 0
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert last["heldout"]["fvu"] > 0
    assert f"{last['heldout']['fvu']:.4f}" in result.stdout
    counts = safetensors.torch.load_file(folder / "latents.safetensors")["counts"]
    assert counts.shape == (384, 6)
    assert counts.sum() <= 8 * 6 * last["heldout"]["n_tokens"]
    page = (folder / "report.html").read_text()
    assert "<script src=" not in page
    assert "https://cdn" not in page.split("</script>", 1)[1]


def test_the_same_seed_gives_the_same_run(run, tmp_path):
    program(*SMALL, "--out", tmp_path / "two")
    program(*SMALL, "--out", tmp_path / "three", "--seed", 1)
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (run[0], tmp_path / "two", tmp_path / "three")
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_some_layers_of_a_local_model_on_a_local_file(tmp_path):
    text = "\n".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(4000))
    (tmp_path / "code.txt").write_text(text)
    result = program(
        builtin.MODEL_DIR, tmp_path / "code.txt", *SMALL, "--layers", 1, 4,
        "--micro_tokens", 128, "--dtype", "bfloat16", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert MLSAE.from_pretrained(tmp_path / "run").config.layers == (1, 4)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_lost(run):
    folder, _ = run
    before = contents(folder)
    result = program(*SMALL, "--out", folder)
    assert result.returncode == 2
    assert "has files in it" in result.stderr
    assert "--overwrite" in result.stderr
    # Nor by --overwrite, where the new run cannot start.
    result = program("no/such-model", *SMALL, "--out", folder, "--overwrite")
    assert result.returncode == 2
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such-model"], "MODEL must be 'builtin'"),
        (["builtin", "no/such-dataset"], "DATASET must be 'builtin'"),
        (["--sae.k", "500"], "--sae.k must be in [1, 384] (the number of latents), got 500"),
        (["--sae.k", "0"], "--sae.k must be at least 1, got 0"),
        (["--layers", "6"], "--layers must be in [0, 5] (the model has 6 layers), got 6"),
        (["--seq_len", "1024"], "--seq_len must be at most 512 (the model's context), got 1024"),
        (["--batch_tokens", "32"], "--batch_tokens and --micro_tokens must be at least 64"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--lr", "-1"], "--lr must be greater than 0, got -1"),
        (["--device", "gpu"], "--device must be auto, cpu, or a CUDA device"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, arguments, message):
    result = program(*SMALL, "--out", tmp_path / "run", *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def allow_files_of_100_kb():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(tmp_path):
    """The weights do not fit."""
    result = program(*SMALL, "--out", tmp_path / "run", before=allow_files_of_100_kb)
    assert result.returncode == 2
    assert "error: cannot write" in result.stderr.splitlines()[-1]
    assert [path.name for path in contents(tmp_path / "run")] == ["metrics.jsonl"]


def test_a_preset_sets_what_is_not_given():
    (paper,) = parse(["--preset", "paper", "--sae.k", "16"])
    assert (paper.sae.expansion, paper.sae.k, paper.lr) == (64, 16, 1e-4)
    assert (paper.tokens, paper.batch_tokens) == (10**9, 64 * 2048)
    assert learning_rate(paper, 32768, 0) == learning_rate(paper, 32768, 10**9) == 1e-4
    assert parse(["--preset=paper"])[0].sae.dead_tokens == 10**7
    assert parse([])[0].preset == "default"


def test_help_teaches():
    result = program("--help")
    assert result.returncode == 0
    for words in ("--sae.expansion", "--batch_tokens", "Latents per dimension", ".zst"):
        assert words in result.stdout


def test_the_report_can_be_drawn_again(run):
    folder, _ = run
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    result = program(folder, module="mlsae.report")
    assert result.returncode == 0, result.stderr
    assert len((folder / "report.html").read_bytes()) == pytest.approx(len(before), rel=0.01)
    result = program(folder / "nothing", module="mlsae.report")
    assert result.returncode == 2
    assert "RUN must be the folder of a finished training run" in result.stderr
