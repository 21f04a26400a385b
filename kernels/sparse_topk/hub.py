"""`SparseTopKSAE`: the module that loads and saves itself, as others on the Hugging Face hub do.

The only file here that knows files and the hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download

from . import module
from .loading import parse_dtype, refuse_unknown

_CARD = """---
{{ card_data }}
---

# A TopK sparse autoencoder

{{ d_in }} inputs, {{ n_latents }} latents, {{ k }} of them active per token.

```python
from sparse_topk import SparseTopKSAE

sae = SparseTopKSAE.from_pretrained("this repository")
values, indices = sae.encode(x)
```
"""


class SparseTopKSAE(
    module.SparseTopKSAE,
    ModelHubMixin,
    library_name="sparse-topk",
    tags=["sparse-autoencoder"],
    model_card_template=_CARD,
):
    """A TopK sparse autoencoder that never stores the dense activations.

        sae = SparseTopKSAE(d_in, n_latents, k, bias=True, device=None, dtype=None)

    Everything that it computes is in its base class, with formulas and shapes. Here it gets
    `save_pretrained(folder)`, `from_pretrained(folder or name)` and `push_to_hub(name)` of
    huggingface_hub's mixin; the files are `config.json` and `model.safetensors`.
    """

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card that `save_pretrained` writes if the folder has none."""
        sizes = {"d_in": self.d_in, "n_latents": self.n_latents, "k": self.k}
        return super().generate_model_card(*args, **sizes, **kwargs)

    def save_pretrained(
        self, save_directory: Path | str, *, push_to_hub: bool = False, **more: Any
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and, unless there is one, the model card. With
        `push_to_hub`, also push them; `more` is then what `push_to_hub` takes. Raises TypeError on
        a keyword that would do nothing."""
        unused = more.keys() - {"config", "repo_id", "model_card_kwargs"}
        if unused and not push_to_hub:
            raise TypeError(
                f"save_pretrained() got an unexpected keyword argument {min(unused)!r}; those of "
                "push_to_hub need push_to_hub=True"
            )
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **more)

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        safetensors.torch.save_file(weights, save_directory / "model.safetensors")
        config = {"d_in": self.d_in, "n_latents": self.n_latents, "k": self.k}
        config["bias"] = self.b_enc is not None
        (save_directory / "config.json").write_text(json.dumps(config, indent=2))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: Path | str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **unknown: Any,
    ) -> Self:
        """Load an SAE from a folder or by its name on the Hugging Face hub; the last five arguments
        are the hub's. `dtype` is a torch.dtype, its name, or, as by default, "auto": the file's.

        Raises ValueError if there is no config.json, or its SAE standardizes its inputs or has
        another activation than TopK; TypeError on another keyword.
        """
        refuse_unknown(unknown)
        sae: Self = super().from_pretrained(
            pretrained_model_name_or_path, revision=revision, token=token, cache_dir=cache_dir,
            force_download=force_download, local_files_only=local_files_only,
            device=device, dtype=parse_dtype(dtype),
        )  # fmt: skip
        return sae

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        config: dict[str, Any] | None = None,
        d_in: int = 0,
        n_latents: int = 0,
        k: int = 0,
        bias: bool = True,
        **hub: Any,
    ) -> Self:
        if config is None:
            raise ValueError(f"{model_id} must hold a config.json, and does not")
        if config.get("standardize"):
            raise ValueError(
                f"{model_id} standardizes its inputs, which a SparseTopKSAE cannot; "
                "load it with the library that saved it"
            )
        if config.get("activation", "topk") != "topk":
            raise ValueError(
                f"{model_id} does not keep the k largest activations, as a SparseTopKSAE does, but "
                f"has the activation {config['activation']}; load it with the library that saved it"
            )
        path: Path | str = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            path = hf_hub_download(model_id, "model.safetensors", **hub)
        sae = cls(d_in, n_latents, k, bias=bias, device="meta")
        weights = safetensors.torch.load_file(path)
        placed = {name: w.to(device, dtype or w.dtype) for name, w in weights.items()}
        sae.load_state_dict(placed, assign=True)
        return sae.requires_grad_()
