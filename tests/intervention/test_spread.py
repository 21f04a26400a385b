"""Edits of a model that is on several devices."""

import torch

from mlsae import MLSAE, MLSAEConfig, builtin
from mlsae.data import transformer
from mlsae.data.config import DataConfig
from mlsae.intervention import Edit, Replace, intervene

CPU = torch.device("cpu")
IDS = torch.arange(20, 32)[None]


def test_a_spread_model_is_edited_as_a_whole_one(monkeypatch):
    """Here over the CPU and the disk. Each part is moved in when it runs."""
    whole = transformer.load_transformer(DataConfig(builtin.NAME), CPU)
    monkeypatch.setattr(transformer, "_free_memory", lambda *_: {"cpu": 6_000_000})
    settings = DataConfig(builtin.NAME, model_device_map="auto")
    spread = transformer.load_transformer(settings, CPU)
    assert set(map(str, spread.hf_device_map.values())) == {"cpu", "disk"}
    torch.manual_seed(0)
    mlsae = MLSAE(MLSAEConfig(192, 64, 4, tuple(range(6)))).requires_grad_(False)
    edits = [Edit(3, (0, 5), "clamp", 6.0), Edit(4, (2,), "ablate"), Replace((4,), "last")]
    logits = []
    for model in (whole, spread):
        with intervene(model, mlsae, edits):
            ids = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
            logits.append(model(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*logits)
    assert not torch.equal(whole(input_ids=ids).logits, logits[0])
