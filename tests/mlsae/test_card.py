"""The model card that is saved and pushed with an MLSAE.

Legend: D inputs, M latents.
"""

from huggingface_hub import ModelCard

from mlsae import MLSAE, MLSAEConfig, card

D, M = 6, 24


def test_a_card_that_is_there_is_kept(tmp_path):
    """And what config.json says beside the config stays with the MLSAE."""
    mlsae = MLSAE(MLSAEConfig(D, M, 3, (0,)))
    (tmp_path / "README.md").write_text("mine")
    mlsae.save_pretrained(tmp_path, training={"lr": 0.5})
    assert (tmp_path / "README.md").read_text() == "mine"
    MLSAE.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert "| `--lr` | 0.5 |" in (tmp_path / "again" / "README.md").read_text()


def test_the_card_tells_the_hub_what_it_tells_of(tmp_path):
    settings = {"d_in": D, "n_latents": M, "k": 3, "standardize": True, "layers": (0, 1)}
    made = card.model_card({**settings, "model": "openai/some", "training": {"dataset": "a/text"}})
    data = ModelCard(str(made)).data
    assert (data.base_model, data.datasets, data.library_name) == (
        "openai/some",
        ["a/text"],
        "mlsae",
    )
    assert "arxiv:2409.04185" in data.tags
    local = card.model_card(
        {**settings, "model": str(tmp_path), "training": {"dataset": "builtin"}}
    )
    assert ModelCard(str(local)).data.base_model is None
    assert ModelCard(str(local)).data.datasets is None
