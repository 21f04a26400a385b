"""Which SAEs an analysis is compared with, and which are refused."""

import shutil

import pytest

from mlsae import MLSAE, MLSAEConfig
from mlsae.analysis.beside import runs_beside
from mlsae.analysis.run import AnalyzeConfig, show_prompt
from mlsae.errors import InputError


@pytest.fixture
def places(tmp_path):
    """SAEs to give: by what is wrong with them."""
    makes = {
        "run": (8, 16, "a"), "larger": (8, 40, "a"), "unnamed": (8, 16, ""),
        "another-model": (8, 16, "b"), "another-width": (4, 16, "a"), "several/x1-k1": (8, 16, "a"),
    }  # fmt: skip
    for name, (d, m, model) in makes.items():
        MLSAE(MLSAEConfig(d, m, 2, (0, 1), model=model)).save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    (tmp_path / "damaged" / "latents.safetensors").write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["another-model"], "must be SAEs of RUN's model, a, and .*another-model is of b; leave"),
        (["another-width"], "must be SAEs of RUN's width, 8, and .*another-width has 4; leave"),
        (["run"], "must be other SAEs than RUN, got .*run; leave it out"),
        (["larger/../run"], "must be other SAEs than RUN, got .*run; leave it out"),
        (["larger", "larger"], "must name each SAE once, got .*larger twice"),
        (["empty"], "must be SAEs that can be read, and .*empty cannot: "),
        (["missing"], "must be SAEs that can be read, and .*missing cannot: "),
        (["larger", "damaged"], r"must be .*damaged cannot: .*latents\.safetensors must be a read"),
        (["several"], "must be one SAE each, and .*several has several: x1-k1; give those"),
    ],
)
def test_what_cannot_be_compared_is_refused(places, given, message):
    with pytest.raises(InputError, match=f"--beside {message}"):
        runs_beside(places / "run", [places / name for name in given])


def test_any_sae_of_the_model_and_width_can_be_compared(places):
    given = [places / "larger", places / "unnamed"]
    assert runs_beside(places / "run", given) == given


def test_a_prompt_has_nothing_beside(places):
    config = AnalyzeConfig(places / "run", prompt="a", beside=(places / "larger",))
    with pytest.raises(InputError, match="--prompt shows one text only; leave one of them out"):
        show_prompt(config, "a")
