"""`python -m mlsae.steer`: its command line, its figures, and what it writes.

Legend: T positions, D width of the residual stream, M latents.
"""

import json
from dataclasses import replace

import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from mlsae import MLSAE, MLSAEConfig
from mlsae.cli import parse
from mlsae.data.residuals import ResidualReader
from mlsae.errors import InputError
from mlsae.intervention import Edit, Replace, intervene, read_activations
from mlsae.intervention.command_line import SteerConfig, changes_of
from mlsae.intervention.effects import measure_effects
from mlsae.intervention.run import steer
from mlsae.steer import steer_and_print
from tests.helpers.make_run import make_run
from tests.helpers.models import CONFIGS, make, save_gpt2

D, M, K = 32, 48, 4
PROMPT = "def main(argv):"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with an untrained MLSAE of a random model."""
    root = tmp_path_factory.mktemp("steer")
    model = save_gpt2(root / "model")
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(D, M, K, (0, 1), model=model))
    mlsae.save_pretrained(root / "run")
    return root / "run"


def configured(run, *arguments):
    return parse(SteerConfig, "", [str(run), "--prompt", PROMPT, *map(str, arguments)], "steer")


def changes(*arguments):
    return changes_of(configured("run", *arguments))


def test_a_latent_is_named_by_flags():
    assert changes("--latent", 7, "--layers", 2, 3, "--add", 4) == [Edit(7, (2, 3), "add", 4.0)]
    found = changes("--latent", 7, "--ablate", "--positions", "last")
    assert found == [Edit(7, None, "ablate", None, "last")]
    found = changes("--latent", 7, "--clamp", -1, "--units", "max", "--positions", "2:7")
    assert found == [Edit(7, None, "clamp", -1.0, slice(2, 7), "max")]


def test_edits_are_named_in_one_word_each_and_keep_their_order():
    found = changes(
        "--edit", "7@2,3:add=4", "--edit", "9@all:ablate", "--latent", 1, "--scale", 2,
        "--edit", "7@0:clamp=-1.5:units=max:positions=1:", "--units", "raw", "--replace", 0, 1,
    )  # fmt: skip
    assert found == [
        Replace((0, 1)),
        Edit(1, None, "scale", 2.0, "all", "raw"),
        Edit(7, (2, 3), "add", 4.0, "all", "raw"),
        Edit(9, None, "ablate", None, "all", "raw"),
        Edit(7, (0,), "clamp", -1.5, slice(1, None), "max"),
    ]
    assert changes("--replace") == [Replace()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "something must be changed: give --latent, --edit .* or --replace"),
        (("--latent", 7), "one of --add, --scale, --clamp and --ablate, got latent 7 and none"),
        (("--add", 7), "got no latent and add"),
        (("--latent", 7, "--add", 1, "--ablate"), "got latent 7 and add, ablate"),
        (("--edit", "7:add=4"), "--edit must be LATENT@LAYERS:OP=VALUE, .* got '7:add=4'"),
        (("--edit", "7@1:add=x"), "the value of --edit must be a number, got 'x'"),
        (("--edit", "7@1:erase"), "op must be add, scale, clamp or ablate, got 'erase'"),
        (("--edit", "7@1:add"), "value must be given with the op 'add'"),
        (("--edit", "7@1:add=1:units=z"), "units must be sigma, max, mean or raw, got 'z'"),
        (("--replace", "--positions", "end"), "positions must be all, .* got 'end'"),
        (("--replace", "--positions", 2**40), "positions must be all, .* got"),
        (("--replace", "--temperature", -1), "--temperature must be at least 0, got -1"),
        (("--replace", "--temperature", "nan"), "--temperature must be at least 0, got nan"),
        (("--replace", "--seed", 2**64), "--seed must be in"),
    ],
)
def test_what_names_no_change_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        changes(*arguments)


def test_the_effects_against_a_dense_oracle():
    torch.manual_seed(2)
    model = make(CONFIGS["llama"])
    mlsae = MLSAE(MLSAEConfig(24, M, K, (0, 1, 2))).requires_grad_(False)
    ids = torch.randint(2, 64, (9,))
    edits = [Edit(3, (0,), "clamp", 5.0), Edit(4, (1,), "add", 1.0)]
    reader = ResidualReader(model)
    effects = measure_effects(mlsae, reader, ids, edits, None, 6)
    before, plain = reader.with_logits(ids[None])
    with intervene(model, mlsae, edits):
        after, steered = reader.with_logits(ids[None])
    log_p, log_q = (y[0].double().log_softmax(-1) for y in (plain, steered))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(effects.kl(), kl)
    moved = log_q[-1].exp() - log_p[-1].exp()
    up, down = effects.next_tokens(4)
    assert [entry["id"] for entry in up] == moved.argsort(descending=True)[:4].tolist()
    assert [entry["id"] for entry in down] == moved.argsort()[:4].tolist()
    assert up[0]["p"][1] - up[0]["p"][0] == pytest.approx(moved.max().item())
    assert up[0]["logit"] == pytest.approx([y[0, -1, up[0]["id"]].item() for y in (plain, steered)])
    dense = []
    for layer in (1, 2):
        h, g = (
            torch.zeros(9, M).scatter(-1, c.indices, c.values)
            for c in (mlsae.encode(x[layer][0]) for x in (before, after))
        )
        change = (g - h).abs().sum(0)
        change[[3, 4]] = 0  # those that are edited
        dense += [(c.item(), j, layer, h[:, j], g[:, j]) for j, c in enumerate(change)]
    dense.sort(key=lambda entry: -entry[0])
    for found, (change, j, layer, h, g) in zip(effects.latents, dense[:6], strict=True):
        assert (found.latent, found.layer) == (j, layer)
        expected = (h.sum().item(), g.sum().item(), change)
        assert found[2:] == pytest.approx(expected, rel=1e-5)


def test_both_continuations_are_the_model_s_own(run, tmp_path):
    path = tmp_path / "new" / "steered.json"
    result = steer(configured(run, "--latent", 5, "--clamp", 9, "--save", path))
    model = transformers.AutoModelForCausalLM.from_pretrained(run.parent / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.parent / "model")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": 40, "do_sample": False}
    plain = model.generate(**inputs, **options)[0]
    with intervene(model, MLSAE.from_pretrained(run), [Edit(5, None, "clamp", 9.0)]):
        steered = model.generate(**inputs, **options)[0]
    n = inputs["input_ids"].shape[1]
    expected = tuple(tokenizer.decode(ids[n:]) for ids in (plain, steered))
    assert result.continuations == expected
    assert expected[0] != expected[1]
    content = json.loads(path.read_text())
    assert (content["baseline"], content["steered"]) == expected
    assert len(content["kl"]) == len(content["tokens"]) == n
    assert content["changes"][0] == {
        "kind": "edit", "latent": 5, "layers": None, "op": "clamp", "value": 9.0,
        "positions": "all", "units": "sigma",
    }  # fmt: skip


def test_sampling_draws_the_same_with_and_without_changes(run):
    config = configured(run, "--latent", 5, "--add", 0, "--temperature", 1e3, "--max_new_tokens", 4)
    baseline, steered = steer(config).continuations
    assert baseline == steered
    assert steer(config).continuations[0] == baseline
    assert steer(replace(config, seed=1)).continuations[0] != baseline


def test_everything_is_printed(run, capsys):
    steer_and_print(configured(run, "--latent", 5, "--layers", 0, "--add", 9))
    printed = capsys.readouterr().out
    for shown in ("latent 5 at layers 0: add 9 sigma, positions all", "baseline", "'def'",
                  "Next tokens that move most", "KL(baseline", "Other latents"):  # fmt: skip
        assert shown in printed
    steer_and_print(configured(run, "--latent", 5, "--add", 9, "--positions", "generated"))
    printed = capsys.readouterr().out
    assert "the prompt's predictions stay the same" in printed
    assert "KL" not in printed


def test_what_cannot_be_steered_is_named(run, tmp_path):
    for arguments, message in (
        (("--latent", 99, "--ablate"), r"latent must be in \[0, 47\], got 99"),
        (("--latent", 1, "--layers", 2, "--ablate"), r"layers must be among .* \(0 1\), got 2"),
        (("--latent", 1, "--add", 1, "--units", "max"), "need .*analysis_latents.parquet, which"),
        (("--latent", 1, "--add", 1e300), "must leave the model's predictions finite"),
        (("--latent", 1, "--add", 1e300, "--positions", "generated"), "predictions finite"),
        (("--replace", "--max_new_tokens", 60), "must be at most 64 tokens together"),
        (("--replace", "--save", tmp_path), "--save must be a folder in which"),
    ):
        with pytest.raises(InputError, match=message):
            steer(configured(run, *arguments))
    with pytest.raises(InputError, match="--prompt must have at least one token"):
        steer(replace(configured(run, "--replace"), prompt=""))


def test_activations_are_read_from_an_analysis(tmp_path):
    make_run(tmp_path)
    found = read_activations(tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "analysis_latents.parquet")
    assert found.max.tolist() == table["max_activation"].to_pylist()
    arrays = safetensors.torch.load_file(tmp_path / "analysis.safetensors")
    j = int(arrays["counts"].sum(1).argmax())
    mean = arrays["totals"][j].sum() / arrays["counts"][j].sum()
    assert found.of(j, "mean") == pytest.approx(mean.item())
    (tmp_path / "analysis_latents.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match=r"cannot be read: .* measure it again"):
        read_activations(tmp_path)
