"""DenseSAE: an SAE with the interface of SAELens and SAEBench, which work on dense activations.

Legend: D inputs, M latents; "…" any leading shape.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_topk import SparseTopKSAE

from .batchtopk import BatchTopKSAE
from .jumprelu import JumpReLUSAE
from .model import MLSAE, Standardized


class DenseConfig(SimpleNamespace):
    """What the tools read as `sae.cfg`. SAELens 6 reads part of it from `cfg.metadata`."""

    def to_dict(self) -> dict[str, Any]:
        """The fields without `metadata`, JSON-serializable."""
        return {name: value for name, value in vars(self).items() if name != "metadata"}


class DenseSAE(nn.Module):
    """A view of an MLSAE or a SparseTopKSAE with dense activations; it shares the parameters.

        f = view.encode(x)       (…, D) → (…, M), M / K times the size of the sparse codes
        x_hat = view.decode(f)   (…, M) → (…, D)
        x_hat = view(x)

    The names `W_enc` (D, M), `W_dec` (M, D), `b_enc` (M,), `b_dec` (D,), `cfg`, `dtype` and
    `device` are SAEBench's. If an MLSAE standardizes, a vector can only be decoded with its own
    mean and deviation, so `decode` uses those of the last `encode`, as SAELens does.

    `layer` and `model` name the source of the residuals for the tools; None means the SAE's own,
    if it has one. Raises ValueError if an MLSAE has several layers and no `layer` is given.
    """

    def __init__(
        self, sae: MLSAE | SparseTopKSAE, *, layer: int | None = None, model: str | None = None
    ) -> None:
        super().__init__()
        self.mlsae = sae if isinstance(sae, MLSAE) else None
        self.sae = sae.sae if isinstance(sae, MLSAE) else sae
        self._standardized: Standardized | None = None
        layers = self.mlsae.config.layers if self.mlsae else ()
        if layer is None and len(layers) > 1:
            raise ValueError(
                f"layer must be given, one of {', '.join(map(str, layers))}, since the tools "
                "measure one layer at a time"
            )
        if layer is None and layers:
            layer = layers[0]
        if model is None:
            model = self.mlsae.config.model if self.mlsae else ""
        self.cfg = self._config(layer, model)

    def _config(self, layer: int | None, model: str) -> DenseConfig:
        about: dict[str, Any] = {
            "model_name": model,
            "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
            "hook_layer": layer,
            "hook_head_index": None,
            "context_size": None,
            "prepend_bos": True,
            "model_from_pretrained_kwargs": {},
            "dataset_path": "",
            "dataset_trust_remote_code": False,
            "seqpos_slice": (None,),
        }
        activation, kwargs = "topk", dict[str, float](k=self.sae.k)
        if isinstance(self.sae, BatchTopKSAE):
            activation = "batchtopk"
            kwargs |= {"k_max": self.sae.k_max, "threshold": self.sae.threshold.item()}
        elif isinstance(self.sae, JumpReLUSAE):
            activation, kwargs = "jumprelu", {}  # dense activations have room for all
        standardize = self.mlsae is not None and self.mlsae.config.standardize
        return DenseConfig(
            **about,
            metadata=SimpleNamespace(**about),
            d_in=self.sae.d_in,
            d_sae=self.sae.n_latents,
            architecture=activation,
            activation_fn_str=activation,
            activation_fn_kwargs=kwargs,
            apply_b_dec_to_input=True,
            finetuning_scaling_factor=False,
            normalize_activations="layer_norm" if standardize else "none",
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            training_tokens=None,
            sae_lens_training_version=None,
            neuronpedia_id=None,
        )

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 # the tools' name
        """(D, M)."""
        return self.sae.W_enc.T

    @property
    def W_dec(self) -> nn.Parameter:  # noqa: N802 # the tools' name
        """(M, D)."""
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        """(M,); zeros if latents have no bias."""
        bias = self.sae.b_enc
        return torch.zeros_like(self.sae.W_enc[:, 0]) if bias is None else bias

    @property
    def b_dec(self) -> nn.Parameter:
        """(D,)."""
        return self.sae.b_dec

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.sae.W_dec.dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.sae.W_dec.device

    def encode(self, x: Tensor) -> Tensor:
        """x (…, D) → f (…, M): activations, 0 where a latent is not active."""
        if self.mlsae is not None:
            self._standardized = self.mlsae.standardize(x, self.cfg.hook_layer)
            x = self._standardized.x
        return self.sae.dense(x.to(self.dtype))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """f (…, M) → x̂ (…, D). Raises ValueError if the leading shape of f is not that of the
        vectors which an MLSAE encoded last."""
        x_hat = feature_acts @ self.sae.W_dec + self.sae.b_dec
        if self.mlsae is None:
            return x_hat
        leading = None if self._standardized is None else self._standardized.mean.shape[:-1]
        if self._standardized is None or leading != feature_acts.shape[:-1]:
            raise ValueError(
                "f must belong to the vectors encoded last, since each is decoded with its own "
                f"mean and deviation, got the leading shape {tuple(feature_acts.shape[:-1])} "
                f"after {None if leading is None else tuple(leading)}"
            )
        return self._standardized.invert(x_hat).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → x̂ (…, D)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def check_decoder_norms(self) -> bool:
        """Whether the norms of W_dec's rows are 1 within 1e-5, or 1e-2 in half precision: SAEBench
        requires it before it measures."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        return bool(((self.W_dec.float().norm(dim=1) - 1).abs() <= (1e-2 if half else 1e-5)).all())
