"""Open a trained MLSAE with the transformer that it was trained on: what `mlsae.steer` and
`mlsae.trace` do first.

Legend: T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from torch import Tensor

from ..data.config import DataConfig
from ..data.model_id import check_lens_model
from ..data.residuals import ResidualReader
from ..data.transformer import check_token_ids, load_tokenizer, load_transformer
from ..distributed import choose_device
from ..errors import InputError
from ..evaluation.trained import load_run
from ..model import MLSAE


@dataclass(frozen=True, kw_only=True)
class OpenConfig:
    """Which MLSAE, and which transformer."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a trained MLSAE, or its name on the Hugging Face hub."""
    lens: Path | None = None
    """The lens of a released checkpoint whose files do not hold it, as for mlsae.evaluate. None:
    the run's own, if it has one."""
    model: str | None = None
    """The transformer. None: the one that the MLSAE was trained on."""
    revision: str | None = None
    """The model's branch, tag or commit on the hub. None: as in the run, or the newest with
    --model."""
    trust_remote_code: bool = False
    """Whether to run Python code from the model's repository. It can do anything that you can, so
    read it before."""
    eos_token: str | None = None
    """The token that ends a text. None: as in the run, or the tokenizer's EOS with --model."""
    device: str = "auto"
    """auto: CUDA if available, else the CPU."""


class Opened(NamedTuple):
    """An MLSAE, and the transformer whose residual stream it reads."""

    mlsae: MLSAE
    name: str
    """The transformer's, on the hub, or its folder."""
    tokenizer: Any
    reader: ResidualReader
    """Of the MLSAE's layers; `reader.model` is the transformer."""

    def tokenize(self, prompt: str, max_new_tokens: int = 0) -> Tensor:
        """The prompt's ids (T,), on the CPU. Raises InputError if there are none, or too many."""
        ids = torch.tensor(self.tokenizer(prompt)["input_ids"], dtype=torch.int64)
        if not len(ids):
            raise InputError("--prompt must have at least one token, got ''; give some text")
        model: Any = self.reader.model
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if not context or len(ids) + max_new_tokens <= context:
            return ids
        if not max_new_tokens:
            raise InputError(
                f"--prompt must have at most {context} tokens (the model's context), got {len(ids)}"
            )
        raise InputError(
            f"--prompt and --max_new_tokens must be at most {context} tokens together (the model's "
            f"context), got {len(ids)} and {max_new_tokens}"
        )


def open_run(config: OpenConfig) -> Opened:
    """The MLSAE of a run, and its transformer. Raises InputError if one of them cannot be loaded,
    or they do not fit together."""
    mlsae, data = read_run(config)
    return open_transformer(mlsae, data)


def read_run(config: OpenConfig) -> tuple[MLSAE, DataConfig]:
    """The MLSAE of a run, on its device, and which transformer it is of: the one that it was
    trained on, or that is given."""
    mlsae = load_run(config.run, choose_device(config.device), config.lens)
    trained = mlsae.about.get("training", {})
    name = config.model or mlsae.config.model
    if not name:
        raise InputError(
            f"--model must be given, since config.json in {config.run} names none, got none"
        )
    own = config.model is None
    data = DataConfig(
        name,
        revision=config.revision or (trained.get("revision") if own else None),
        trust_remote_code=config.trust_remote_code,
        eos_token=config.eos_token or (trained.get("eos_token") if own else None),
        model_dtype=trained.get("model_dtype", "auto"),
        model_device_map=trained.get("model_device_map"),
        model_quantize=trained.get("model_quantize"),
    )
    if mlsae.lens is not None:
        check_lens_model(mlsae.lens, data, mlsae.config.d_in)
    return mlsae, data


def open_transformer(mlsae: MLSAE, data: DataConfig) -> Opened:
    """The transformer of `data`, on the device of `mlsae`."""
    tokenizer, model = load_tokenizer(data), load_transformer(data, mlsae.sae.W_dec.device)
    check_token_ids(tokenizer, model)
    reader = ResidualReader(model, mlsae.config.layers or None)
    return Opened(mlsae, data.model, tokenizer, reader)
