"""Models of the hub: their revisions, and code from their repositories."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mlsae import MLSAE, MLSAEConfig, builtin
from mlsae.config import SAEConfig, TrainConfig
from mlsae.data import transformer
from mlsae.data.blocks import find_blocks
from mlsae.data.config import DataConfig
from mlsae.data.stream import read_shape
from mlsae.data.transformer import load_tokenizer, load_transformer
from mlsae.errors import InputError
from mlsae.evaluation import heldout
from mlsae.evaluation.run import EvaluateConfig
from mlsae.training.settings import settings_of
from tests.helpers.models import CONFIGS, saved

CPU = torch.device("cpu")
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The cache of the hub, with two revisions of the model lab/model."""
    folder = tmp_path / "models--lab--model"
    for i, (name, commit) in enumerate((("main", "a" * 40), ("step3000", "b" * 40))):
        snapshot = folder / "snapshots" / commit
        shutil.copytree(builtin.MODEL_DIR, snapshot)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
        if i:
            weights = load_file(snapshot / "model.safetensors")
            save_file({k: w / 2 for k, w in weights.items()}, snapshot / "model.safetensors",
                      metadata={"format": "pt"})  # fmt: skip
            tokenizer = transformers.AutoTokenizer.from_pretrained(snapshot)
            tokenizer.pad_token = "a"
            tokenizer.save_pretrained(snapshot)
            config = json.loads((snapshot / "config.json").read_text())
            config["max_position_embeddings"] = 77
            (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def test_a_revision_is_that_of_the_weights_the_configuration_and_the_tokenizer(cached):
    main, step = DataConfig("lab/model"), DataConfig("lab/model", revision="step3000")
    assert transformer.load_config(step).max_position_embeddings == 77
    assert transformer.load_config(main).max_position_embeddings > 77
    assert load_tokenizer(step).pad_token == "a"
    assert load_tokenizer(main).pad_token != "a"
    for n_layers in (None, 2):
        embeddings = [
            load_transformer(each, CPU, n_layers).get_input_embeddings().weight
            for each in (main, step)
        ]
        assert torch.equal(embeddings[1], embeddings[0] / 2)
    with pytest.raises(InputError, match=r"MODEL .* 'lab/model' at revision 'step9' cannot be"):
        transformer.load_config(dataclasses.replace(main, revision="step9"))


def test_a_revision_is_recorded_and_measured_on(cached, tmp_path):
    config = TrainConfig(
        DataConfig("lab/model", revision="step3000", layers=(1,), seq_len=64),
        sae=SAEConfig(expansion=2, k=8), tokens=1500, batch_tokens=512, eval_tokens=512,
        out=tmp_path / "run",
    )  # fmt: skip
    mlsae = MLSAE(MLSAEConfig(read_shape(config.data).d_in, 16, 2, (1,), model="lab/model"))
    mlsae.about = {"training": settings_of(config)}
    mlsae.save_pretrained(config.out)
    about = json.loads((config.out / "config.json").read_text())
    assert about["training"]["revision"] == "step3000"
    options = {"revision": "main"}, {"model": "lab/model"}, {}
    opened = [heldout.open_run(EvaluateConfig(config.out, **each), CPU)[1] for each in options]
    assert [stream.config.revision for stream in opened] == ["main", None, "step3000"]
    embedding = opened[2].reader.model.get_input_embeddings().weight
    assert torch.equal(embedding, opened[0].reader.model.get_input_embeddings().weight / 2)


@pytest.mark.parametrize("local", [False, True])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(local, tmp_path):
    settings = DataConfig(str(tmp_path) if local else builtin.NAME, revision="main")
    for load in (transformer.load_config, load_tokenizer):
        with pytest.raises(InputError, match=r"--revision must .* got 'main'; leave it out"):
            load(settings)


def test_code_from_a_model_s_repository_runs_only_on_request(tmp_path, monkeypatch):
    """Nor is anybody asked at the keyboard."""
    _, settings = saved(CONFIGS["llama"], tmp_path)
    (tmp_path / "code.py").write_text(
        "import transformers\n"
        "class OwnConfig(transformers.LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(transformers.LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for load in (transformer.load_config, lambda config: load_transformer(config, CPU, 2)):
        with pytest.raises(InputError, match=r"needs Python code .* give --trust_remote_code if"):
            load(settings)
    model = load_transformer(dataclasses.replace(settings, trust_remote_code=True), CPU, 2)
    assert type(model).__name__ == "OwnModel"
    assert len(find_blocks(model)) == 2


def test_a_run_cannot_permit_code_from_a_repository():
    recorded = {"dataset": builtin.NAME, "trust_remote_code": True}
    mlsae = MLSAE(MLSAEConfig(8, 16, 2, (0,), model="lab/model"))
    data = heldout._data_config(EvaluateConfig(Path("run")), mlsae, recorded)
    assert not data.trust_remote_code
