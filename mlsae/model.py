"""The multi-layer SAE: one TopK SAE on the residual stream of every layer.

Legend: L layers, N tokens, D inputs, M latents, K active latents a token; "…" any leading shape.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from sparse_topk import SparseTopKSAE, TopK

from . import formats
from .card import model_card
from .distributed import ALONE, Group
from .errors import InputError
from .files import write_file
from .formats import SavedSAE
from .sharding import ShardedSAE

SIGMA_EPS = 1e-5
_OFFLINE = "it is not here and HF_HUB_OFFLINE=1 is set; unset that, or first run `hf download"
_FILES = ["config.json", "model.safetensors", "README.md", formats.SETTINGS, formats.CARRIED]
ACTIVE = 1e-3  # a latent counts as active above this (arXiv 2409.04185, App. A)


@dataclass(frozen=True)
class MLSAEConfig:
    """What an MLSAE is, apart from its weights: the keys of `config.json` that loading needs."""

    d_in: int
    """Width of the residual stream (D)."""
    n_latents: int
    """Latents of the SAE (M)."""
    k: int
    """Active latents a token and layer (K)."""
    layers: tuple[int, ...]
    """The transformer's layers it was trained on, in the order of its inputs; empty where a loaded
    file does not say."""
    standardize: bool = True
    """Whether each vector is standardized before encoding."""
    model: str = ""
    """The transformer's name on the hub, or its folder; empty where a loaded file does not say."""
    bias: bool = False
    """Whether latents have a bias, `b_enc`. The paper's have none."""


class Losses(NamedTuple):
    """What one pass gives: the loss to differentiate, and sums for the metrics."""

    loss: Tensor
    """() mean over layers of the FVU, plus aux_weight · aux."""
    aux: Tensor
    """() the AuxK loss; exactly 0 with no dead latents."""
    sq_error: Tensor
    """(L,) Σ_n |x − x̂|² in the units of x, detached."""
    error: Tensor
    """(L, N, D) x̃ − x̃̂, standardized units, detached."""
    codes: TopK
    """(L, N, K) active latents."""


class MLSAE(nn.Module, ModelHubMixin):
    """One TopK SAE for the residual vectors of all layers (Lawson et al., arXiv 2409.04185).

        μ, σ = mean and unbiased standard deviation of x over its D elements
        x̃ = (x − μ) / (σ + 1e-5)
        h = ReLU(TopK(W_enc (x̃ − b_pre)))
        x̂ = (Σ_k h · W_dec rows + b_pre) · σ + μ

    Nothing depends on the layer. b_pre is the SAE's `b_dec`; there is no latent bias, unless
    `bias` is on for a converted one. With `standardize=False`, the vectors are taken as they are.
    With `shards`, a group of several processes, each holds a part of the latents (see `sharding`).

    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of huggingface_hub's mixin.
    """

    about: dict[str, Any]
    """What else `config.json` says: settings of the training, versions, held-out figures."""

    def __init__(
        self,
        config: MLSAEConfig,
        device: torch.device | str | None = None,
        shards: Group = ALONE.latents,
    ) -> None:
        super().__init__()
        self.config, self.shards = config, shards
        self.about = {}
        shape = (config.d_in, config.n_latents, config.k)
        self.sae: SparseTopKSAE = (
            SparseTopKSAE(*shape, bias=config.bias, device=device)
            if shards.size == 1
            else ShardedSAE(*shape, shards, device=device)
        )

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x̃ (…, D) float32, μ and σ (…, 1). A constant vector has σ = 0 and becomes 0:
        x̂ is then the constant, exactly. A vector that is not finite becomes NaN, and so stops
        training (see `trainer.Step.check`)."""
        x = x.float()
        if not self.config.standardize:
            return x, torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        std, mean = torch.std_mean(x, dim=-1, keepdim=True)
        return (x - mean) / (std + SIGMA_EPS), mean, std

    def encode(self, x: Tensor) -> TopK:
        """The active latents of residual vectors x (…, D): values and indices (…, K)."""
        return self.sae.encode(self.standardize(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        """x̂ (…, D), in the units of x."""
        standard, mean, std = self.standardize(x)
        return self.sae(standard) * std + mean

    def losses(
        self,
        x: Tensor,
        variance: Tensor,
        n_tokens: int,
        *,
        dead: Tensor | None = None,
        k_aux: int = 0,
        error_variance: Tensor | None = None,
        aux_weight: float = 1 / 32,
    ) -> Losses:
        """The training loss of residuals x (L, N, D), a part of a step of `n_tokens` tokens.

            loss = mean_ℓ [ Σ_n |x − x̂|² / (n_tokens · variance_ℓ) ] + aux_weight · aux
            e    = x̃ − x̃̂, detached;  ê = Σ ReLU(TopK_{k_aux} among the dead) · W_dec rows
            aux  = mean_ℓ [ Σ_n |e − ê|² / (n_tokens · error_variance_ℓ) ]

        `variance` (L,) and `error_variance` (L,) are given, from the tokens seen before (see
        `metrics.Moments.variance`), and `n_tokens` is the whole step's: so the losses of the
        parts of a step add up to the loss of the whole, however it is split. With no `dead` ids
        (Q,) or no `error_variance`, aux is 0. Its gradient reaches W_enc and W_dec only. Of shards,
        `dead` are a shard's own; None where no shard has any.
        """
        standard, mean, std = self.standardize(x)
        out = self.sae.reconstruct(standard)
        reconstruction, codes = out.x_hat, out.codes
        error = standard - reconstruction
        sq_error = (x - reconstruction * std - mean).square().sum((1, 2))  # (L,)
        loss = (sq_error / variance).mean() / n_tokens
        aux = torch.zeros((), device=x.device)
        some_dead = dead is not None and (len(dead) > 0 or self.shards.size > 1)
        if dead is not None and some_dead and error_variance is not None:
            centered = (standard - self.sae.b_dec).detach()
            predicted = self.sae.reconstruct_subset(centered, dead, k_aux)
            missed = (error.detach() - predicted).square().sum((1, 2))
            aux = (missed / error_variance).mean() / n_tokens
        return Losses(
            loss + aux_weight * aux, aux.detach(), sq_error.detach(), error.detach(), codes
        )

    def gather_rows(self, part: Tensor) -> Tensor:
        """All latents' rows (M, …) of a tensor with one row per latent, of which this process holds
        `part`. Collective when sharded: every rank must call it; only rank 0 receives all rows,
        and the others get `part` back."""
        return self.sae.gather_rows(part)

    def own_rows(self, whole: Tensor) -> Tensor:
        """This process's rows (M/S, …) of `whole` (M, …), a tensor with one row per latent."""
        return self.sae.own_rows(whole)

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, as those of an unsharded one: see `gather_rows`."""
        return {
            name: self.gather_rows(p) if p.ndim == 2 else p
            for name, p in self.sae.state_dict().items()
        }

    def save_pretrained(  # type: ignore[override] # `extra` goes into config.json
        self,
        save_directory: Path | str,
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: None = None,
        **extra: Any,
    ) -> str | None:
        """Write `config.json` (this config, and `about`, which `extra` is added to),
        `model.safetensors` (`W_enc` (M, D), `W_dec` (M, D), `b_dec` (D,), in their dtype) and,
        where there is none, the model card `README.md`. Each file is replaced at once. Of shards,
        all must call it, and the first one writes.

        With `push_to_hub`, also push it to `repo_id`, and return the commit's address. `config`
        and `model_card_kwargs` are of the mixin's: an MLSAE knows both itself.
        """
        self.about.update(extra)
        checkpoint = self.to_saved()
        if self.shards.rank > 0:
            return None
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in formats.own.files(checkpoint).items():
            write_file(folder / name, content)
        if not (folder / "README.md").exists():
            write_file(folder / "README.md", str(self.generate_model_card()).encode())
        return self.push_to_hub(repo_id or folder.name) if push_to_hub else None

    def generate_model_card(self, *_args: Any, **_kwargs: Any) -> ModelCard:
        """The model card: what it is, its settings, and its held-out figures where known."""
        return model_card({**asdict(self.config), **self.about})

    def to_saved(self) -> SavedSAE:
        """What the files of any format are made of; of shards, in the process of the first."""
        config = self.config
        weights = {name: p.detach().cpu() for name, p in self.weights().items()}
        return SavedSAE(
            weights, config.k, config.standardize, config.layers, config.model, self.about
        )

    @classmethod
    def from_saved(cls, found: SavedSAE, device: torch.device | str = "cpu") -> Self:
        """An MLSAE of what the files of any format hold; in float32, whatever they are in."""
        config = MLSAEConfig(
            found.d_in,
            found.n_latents,
            found.k,
            found.layers,
            found.standardize,
            found.model,
            "b_enc" in found.weights,
        )
        mlsae = cls(config, device="meta")
        weights = {name: w.to(device, torch.float32) for name, w in found.weights.items()}
        mlsae.sae.load_state_dict(weights, assign=True)
        mlsae.about = dict(found.about)
        return mlsae.requires_grad_()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Path | str,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> Self:
        """Load an MLSAE, or a checkpoint of the paper's own code, from a folder or by its name on
        the Hugging Face hub (`hub`: revision, token, cache_dir, force_download,
        local_files_only). With HF_HUB_OFFLINE=1, a name must have been downloaded before.

        Raises InputError if a file is missing, damaged, or of another shape than the config.
        """
        name = str(pretrained_model_name_or_path)
        try:
            if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith(("/", "."))):
                raise FileNotFoundError("there is no such folder")
            return super().from_pretrained(name, device=device, **hub)
        except (OSError, ValueError) as error:
            offline = isinstance(error, LocalEntryNotFoundError) and constants.is_offline_mode()
            raise InputError(
                "RUN must be the folder of a trained MLSAE (config.json and model.safetensors) or "
                f"its name on the Hugging Face hub, and {name} cannot be loaded: "
                + (f"{_OFFLINE} {name}`" if offline else str(error))
            ) from error

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, device: torch.device | str = "cpu", **hub: Any
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            hub.pop("config", None)  # the mixin has read it; `formats` reads it anew
            folder = Path(snapshot_download(model_id, allow_patterns=_FILES, **hub))
        found = formats.read(folder)
        theirs = found.about.get("released", {})
        if theirs and (theirs.get("tuned_lens") or "-lens" in Path(model_id).name):
            warnings.warn(
                f"{model_id} was trained on residuals that a tuned lens had transformed: give it "
                "those; of residuals as they are, its codes mean nothing",
                stacklevel=4,
            )
        return cls.from_saved(found, device)


def load_sae(path: Path | str, device: torch.device | str = "cpu") -> SparseTopKSAE:
    """The SAE in a folder or file of any of `formats.FORMATS`, ready to use and to train on.

    Raises InputError if it cannot be read, or standardizes its inputs: an MLSAE does that.
    """
    found = formats.read(path)
    if found.standardize:
        raise InputError(
            f"PATH must hold an SAE that takes its inputs as they are, and that in {path} "
            "standardizes them; load it with MLSAE.from_saved(formats.read(PATH))"
        )
    return MLSAE.from_saved(found, device).sae
