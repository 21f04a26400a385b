"""Saving, loading and pushing, through huggingface_hub's mixin; the hub is `hub_server`.

Legend: D inputs, M latents.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelHubMixin, constants

from mlsae import MLSAE, MLSAEConfig, load_sae
from mlsae.config import TrainConfig
from mlsae.errors import InputError
from mlsae.hub import check_push, push_run
from mlsae.training.run import train
from sparse_topk import SparseTopKSAE
from tests.helpers.hub_server import TOKEN, hub
from tests.helpers.programs import SMALL

D, M = 6, 24


@pytest.fixture
def server():
    with hub() as server:
        yield server


def python(code, server, home, *, offline=False, token=TOKEN, module=False):
    """What a process prints that runs `code`, or a module with its arguments, on that hub."""
    environment = {
        **os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_TOKEN": token,
        "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "200",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *(["-m", *map(str, code)] if module else ["-c", code])],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


ROUND_TRIP = """
import torch
from mlsae import MLSAE, MLSAEConfig
from sparse_topk import SparseTopKSAE

torch.manual_seed(0)
mlsae = MLSAE(MLSAEConfig(6, 24, 3, (0, 2), model="gpt2"))
mlsae.about = {"training": {"lr": 0.001}}
sae = SparseTopKSAE(6, 24, 3)
"""
LOAD = """
for one, name, load in (
    (mlsae, "me/mlsae", MLSAE.from_pretrained), (sae, "lab/sae", SparseTopKSAE.from_pretrained)
):
    again = load(name)
    state, other = one.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
again = MLSAE.from_pretrained("me/mlsae")
assert again.config == mlsae.config and again.about == mlsae.about
print("same")
"""


def test_what_is_pushed_is_pulled_and_then_loads_offline(tmp_path, server):
    push = 'print(mlsae.push_to_hub("me/mlsae"), sae.push_to_hub("lab/sae"))'
    result = python(ROUND_TRIP + push + LOAD, server, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "me/mlsae/commit" in result.stdout
    files = {"config.json", "model.safetensors", "README.md"}
    assert {name: set(held) for name, held in server.repos.items()} == {
        "me/mlsae": files,
        "lab/sae": files,
    }
    assert "SparseTopKSAE.from_pretrained" in server.repos["lab/sae"]["README.md"].decode()
    server.repos.clear()
    assert "same" in python(ROUND_TRIP + LOAD, server, tmp_path, offline=True).stdout


def test_a_name_that_is_nowhere_is_said_so(tmp_path, server):
    code = (
        "from mlsae import MLSAE\nfrom mlsae.errors import InputError\n"
        "try:\n    MLSAE.from_pretrained('me/nothing')\n"
        "except InputError as error:\n    print(error)"
    )
    for offline, told in (
        (False, "Repository Not Found"),
        (True, "unset that, or first run `hf download me/nothing`"),
    ):
        result = python(code, server, tmp_path, offline=offline)
        assert "its name on the Hugging Face hub, and me/nothing cannot be loaded" in result.stdout
        assert told in result.stdout
    with pytest.raises(InputError, match="there is no such folder"):
        MLSAE.from_pretrained(tmp_path / "nothing")


@pytest.fixture
def here(server, monkeypatch):
    """That hub for this process too."""
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.mark.parametrize(
    ("name", "token", "told"),
    [
        ("me/run", "", "run `hf auth login`"),
        ("me/run", "hf_theirs", "needs the hub to know you"),
        ("you/run", TOKEN, "must be a name of yours, me/run or lab/run"),
        ("a/b/c", TOKEN, "must be like user/name"),
    ],
)
def test_who_cannot_push_is_told_before_training(tmp_path, here, monkeypatch, name, token, told):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=told):
        train(TrainConfig(out=tmp_path / "run", push_to_hub=name))
    assert not (tmp_path / "run").exists()
    assert not here.repos


def test_a_hub_that_is_not_there_or_turned_off_is_told(here, monkeypatch):
    check_push("me/run")
    check_push("lab/run")
    here.shutdown()
    here.server_close()
    with pytest.raises(InputError, match="needs the hub to know you, and it does not"):
        check_push("me/run")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE=1 is set; unset it"):
        check_push("me/run")


def test_a_run_is_pushed_at_its_end(tmp_path, server):
    out = tmp_path / "run"
    arguments = ["mlsae.train", *SMALL, "--out", out, "--push_to_hub", "lab/run"]
    result = python(arguments, server, tmp_path, module=True)
    assert result.returncode == 0, result.stderr
    assert f"pushed: {server.address}/lab/run/commit" in result.stderr
    pushed = server.repos["lab/run"]
    assert set(pushed) == {
        "config.json", "model.safetensors", "latents.safetensors", "metrics.jsonl", "report.html",
        "README.md",
    }  # fmt: skip
    assert all(content == (out / name).read_bytes() for name, content in pushed.items())
    text, heldout = pushed["README.md"].decode(), json.loads(pushed["config.json"])["heldout"]
    assert f"{heldout['fvu']:.4f}" in text
    for layer in range(6):
        assert f"| {layer} | {heldout['fvu_layers'][layer]:.4f} |" in text
    assert "| `--tokens` | 4000 |" in text
    assert str(tmp_path) not in text, "no path of this machine"


def test_a_push_that_fails_tells_how_to_push_later(tmp_path, here):
    here.RequestHandlerClass = type(
        "Full", (here.RequestHandlerClass,), {"do_POST": lambda self: self.answer({}, 507)}
    )
    with pytest.raises(InputError, match=f"push it with `hf upload me/run {tmp_path} "):
        push_run(tmp_path, "me/run", ["config.json"])


def test_both_are_of_the_hubs_own_mixin():
    assert issubclass(MLSAE, ModelHubMixin)
    assert issubclass(SparseTopKSAE, ModelHubMixin)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_topk_sae_is_saved_and_loaded(tmp_path, bias, dtype):
    sae = SparseTopKSAE(D, M, 3, bias=bias, dtype=dtype)
    torch.nn.init.normal_(sae.b_dec)
    sae.save_pretrained(tmp_path)
    for again in (SparseTopKSAE.from_pretrained(tmp_path), SparseTopKSAE.from_pretrained(tmp_path)):
        assert (again.k, again.W_dec.dtype, again.W_dec.requires_grad) == (3, dtype, True)
        assert all(
            torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True)
        )
    assert SparseTopKSAE.from_pretrained(tmp_path, dtype=torch.float16).W_enc.dtype == torch.float16
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "d_in": D, "n_latents": M, "k": 3, "bias": bias,
    }  # fmt: skip
    assert load_sae(tmp_path).k == 3


@pytest.fixture(params=[MLSAE, SparseTopKSAE])
def saved(request, tmp_path):
    """Each class, and the folder of one of its SAEs with weights in bfloat16."""
    made = MLSAE(MLSAEConfig(D, M, 3, (0,))) if request.param is MLSAE else SparseTopKSAE(D, M, 3)
    made.to(torch.bfloat16).save_pretrained(tmp_path)
    return request.param, tmp_path


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float16),
        ("float64", torch.float64),
        ("torch.float32", torch.float32),
        ("auto", torch.bfloat16),
    ],
)
def test_weights_are_loaded_in_the_dtype_asked_for(saved, dtype, expected):
    kind, folder = saved
    loaded, exact = (kind.from_pretrained(folder, dtype=d) for d in (dtype, "auto"))
    for p, true in zip(loaded.parameters(), exact.parameters(), strict=True):
        assert p.dtype == expected
        assert p.requires_grad
        assert torch.equal(p, true.to(expected))


def test_weights_are_loaded_on_the_device_asked_for(saved):
    kind, folder = saved
    for device in ("meta", torch.device("meta")):
        assert {p.device.type for p in kind.from_pretrained(folder, device).parameters()} == {
            "meta"
        }
    assert {p.device.type for p in kind.from_pretrained(folder).parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", ["bfloat", "int8", torch.int32, 16, "nn"])
def test_a_dtype_that_is_none_is_refused(saved, dtype):
    kind, folder = saved
    with pytest.raises(ValueError, match=r"dtype must be a floating-point torch.dtype, .* got "):
        kind.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("keyword", "told"),
    [
        ("torch_dtype", "did you mean dtype"),
        ("map_location", "did you mean device"),
        ("devise", "did you mean device"),
        ("revison", "did you mean revision"),
        ("k", "there are device, dtype, revision"),
        ("config", "there are device, dtype, revision"),
    ],
)
def test_a_keyword_that_is_unknown_is_refused(saved, keyword, told):
    kind, folder = saved
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'; {told}"):
        kind.from_pretrained(folder, **{keyword: "x"})
    loaded = kind.from_pretrained(
        folder, revision=None, token=None, cache_dir=None, force_download=False,
        local_files_only=True,
    )  # fmt: skip
    assert isinstance(loaded, kind)


def test_saving_takes_no_keyword_that_does_nothing(tmp_path):
    """What an MLSAE is given goes into config.json; see below."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'note'"):
        SparseTopKSAE(D, M, 3).save_pretrained(tmp_path, note="lost")
    for keywords in ({"config": {"k": 5}}, {"model_card_kwargs": {"license": "mit"}}):
        with pytest.raises(TypeError, match="config and model_card_kwargs cannot be given"):
            MLSAE(MLSAEConfig(D, M, 3, (0,))).save_pretrained(tmp_path, **keywords)
    assert not list(tmp_path.iterdir())


def test_a_sparse_topk_sae_does_not_load_one_that_standardizes(tmp_path):
    MLSAE(MLSAEConfig(D, M, 3, (0,))).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="standardizes its inputs, which a SparseTopKSAE cannot"):
        SparseTopKSAE.from_pretrained(tmp_path / "a")
    MLSAE(MLSAEConfig(D, M, 3, (0,), standardize=False)).save_pretrained(tmp_path / "b")
    assert SparseTopKSAE.from_pretrained(tmp_path / "b").b_enc is None


def test_a_folder_of_several_runs_is_refused_with_their_names(tmp_path):
    for name in ("a", "b"):
        MLSAE(MLSAEConfig(D, M, 3, (0,))).save_pretrained(tmp_path / name)
    (tmp_path / "a" / "checkpoints").mkdir()
    (tmp_path / "a" / "checkpoints" / "1.safetensors").touch()
    with pytest.raises(InputError) as refused:
        MLSAE.from_pretrained(tmp_path)
    assert str(refused.value).endswith(f"give one of these: {tmp_path}/a, {tmp_path}/b")
