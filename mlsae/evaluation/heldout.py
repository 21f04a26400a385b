"""Open a trained MLSAE, and the transformer and held-out text to measure it on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from .. import builtin
from ..data.config import DataConfig, check_seed, check_share
from ..data.model_id import check_lens_model
from ..data.sinks import DropRule
from ..data.stream import DataStream, read_shape
from ..distributed import log_rank0
from ..errors import InputError
from ..model import MLSAE
from .trained import load_run

_DEFAULT_MICRO_TOKENS = 2048
# Settings of the text that a measurement takes from the run:
_SHARES = ("heldout_share", "max_bad_records")  # for any text
_PARTS = ("column", "dataset_config", "dataset_split", "dataset_revision")  # for its own dataset
_APART = ("dataset_config", "dataset_split")  # which have no text in common
_MEDIAN_TOKENS = 16_384  # of the held-out rows, to measure norms on
_MOST_RESAMPLES = 1_000_000


@dataclass(frozen=True)
class HeldoutConfig:
    """Which MLSAE to measure, and on what."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a trained MLSAE, or its name on the Hugging Face hub."""
    dataset: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DATASET]")] = None
    """Text: "builtin", a dataset on the hub (streamed), or a local file or folder; its held-out
    rows are used. None: the text that the run was trained on."""
    tokens: int = 65_536
    """Held-out tokens to measure on, counting special ones; fewer if the text has fewer."""
    layers: tuple[int, ...] | None = None
    """Layers to measure at; they may be others than those it was trained on. None: those it was
    trained on, or all if not known."""
    model: str | None = None
    """The transformer. None: the one it was trained on."""
    lens: Path | None = None
    """The lens of a released checkpoint whose files do not hold it: a folder of the tuned-lens
    package, or a lens.safetensors. None: the run's own, if it has one."""
    revision: str | None = None
    """The model's branch, tag or commit on the hub. None: as in the run, or the newest with
    --model."""
    trust_remote_code: bool = False
    """Whether to run Python code from the model's repository. It can do anything that you can, so
    read it before."""
    eos_token: str | None = None
    """The token that joins documents. None: as in the run, or the tokenizer's EOS with --model."""
    column: str | None = None
    """The dataset's column of text, token ids or chats. None: as in the run, if it was trained on
    this dataset, else "text"."""
    dataset_config: str | None = None
    """Configuration of a dataset on the hub. None: as in the run, if it was trained on this
    dataset, else the default one."""
    dataset_split: str | None = None
    """Split of a dataset on the hub, or of a folder that save_to_disk left of several. None: as in
    the run, if it was trained on this dataset, else train."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a dataset on the hub. None: as in the run, if it was trained on this
    dataset, else the newest."""
    heldout_share: float | None = None
    """Share of the text that is held out, by the hash that chose it in training; of the text that
    the run was trained on, at most the run's. 1: all of another text. None: as in the run, or
    0.05."""
    max_bad_records: float | None = None
    """Share of the dataset's records that may be bad. None: as in the run."""
    token_cache: Path | None = None
    """Folder that keeps the text's tokens, as in training. None: mlsae/tokens in your folder for
    caches ($XDG_CACHE_HOME, ~/.cache), or $MLSAE_TOKEN_CACHE."""
    no_token_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read the text and tokenize it, whatever the cache has, and keep nothing."""
    seq_len: int | None = None
    """Tokens per row. None: as in the run."""
    drop_positions: tuple[int, ...] | None = None
    """Positions in a row to leave out, beside special tokens. None: as in the run. (Without values:
    none.)"""
    drop_tokens: tuple[str, ...] | None = None
    """Tokens to leave out, by id or text. None: as in the run."""
    drop_norm: float | Literal["auto", "off"] | None = None
    """Leave out tokens whose norm exceeds so many times the median of a layer, at any layer that is
    measured. auto: 10 if the first rows have such tokens. None: as in the run, with its medians
    where it has them; else the medians are those of the first rows."""
    micro_tokens: int | None = None
    """Tokens held in memory at a time; changes nothing else. None: 2,048, or one row if rows are
    longer."""
    resamples: int = 1000
    """Bootstrap resamples of the rows, for the intervals."""
    seed: int | None = None
    """Seed of the order of rows, of examples and of the bootstrap. None: the run's, which gives
    the held-out rows that its training validated on."""
    device: str = "auto"
    """auto: CUDA if available, else the CPU."""
    out: Path | None = None
    """Folder for the results. None: the run's folder, which must then be local."""


def open_run(
    config: HeldoutConfig, device: torch.device, drop: DropRule | None = None
) -> tuple[MLSAE, DataStream]:
    """Load the MLSAE of `config.run`, and open the transformer and text to measure it on. With
    `drop`, just that is left out, whatever `config` says.

    Raises InputError for bad input, before anything is measured.
    """
    for name in ("tokens", "resamples", "seq_len", "micro_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if config.heldout_share is not None:
        check_share("heldout", config.heldout_share)
    if config.resamples > _MOST_RESAMPLES:  # else memory might end only after the measurement
        raise InputError(f"--resamples must be at most {_MOST_RESAMPLES:,}, got {config.resamples}")
    mlsae = load_run(config.run, device, config.lens)
    if config.out is None and not config.run.exists():
        raise InputError(f"--out must be given if RUN is on the hub, as {config.run} is, got none")
    trained = mlsae.about.get("training", {})
    data = _data_config(config, mlsae, trained)
    shape = read_shape(data)
    micro_tokens = config.micro_tokens or max(_DEFAULT_MICRO_TOKENS, shape.seq_len)
    if micro_tokens < shape.seq_len:
        raise InputError(
            f"--micro_tokens must be at least {shape.seq_len} (a row; see --seq_len), "
            f"got {micro_tokens}"
        )
    if shape.d_in != mlsae.config.d_in:
        raise InputError(
            f"MODEL must have a residual stream of width {mlsae.config.d_in}, as the MLSAE in "
            f"{config.run}, and {data.model} has {shape.d_in}; give the model that the "
            "MLSAE was trained on with --model"
        )
    if mlsae.lens is not None:
        check_lens_model(mlsae.lens, data, shape.d_in)
        mlsae.lens.check_layers(shape.layers)
    seed = config.seed if config.seed is not None else trained.get("seed") or 0
    check_seed(seed)
    stream = DataStream(data, shape, device, micro_rows=micro_tokens // shape.seq_len, seed=seed)
    if drop is not None:
        stream.drop = drop
    else:
        _drop_norms(config, mlsae, stream)
    return mlsae, stream


def check_kept(token_mask: Tensor, text_mask: Tensor) -> None:
    """Raise InputError unless tokens are kept, token_mask (R, T), of those that are not special,
    text_mask (R, T)."""
    if not text_mask.any():
        raise InputError("DATASET must hold tokens that are not special, got none")
    if not token_mask.any():
        raise InputError(
            "--drop_positions, --drop_tokens and --drop_norm must leave tokens to measure on, and "
            f"drop all {int(text_mask.sum()):,} of them"
        )


def _drop_norms(config: HeldoutConfig, mlsae: MLSAE, stream: DataStream) -> None:
    """Complete what is dropped: by norm, with the run's medians if it has them for these layers,
    else with those of the first held-out rows."""
    trained = DropRule.from_dict(mlsae.about.get("dropped", {}))
    medians = dict(zip(mlsae.config.layers, trained.medians, strict=False))
    layers = stream.reader.layers
    same = stream.config.model == mlsae.config.model and set(layers) <= set(medians)
    if config.drop_norm is None and trained.norm is not None and same:
        own = tuple(medians[layer] for layer in layers)
        stream.drop = replace(stream.drop, norm=trained.norm, medians=own)
    elif stream.config.drop_norm != "off":
        found = stream.resolve_drop(stream.heldout(min(config.tokens, _MEDIAN_TOKENS)))
        if found:
            log_rank0(found)


def _data_config(config: HeldoutConfig, mlsae: MLSAE, trained: dict[str, Any]) -> DataConfig:
    """The text, the transformer and the layers to measure at. What `config` leaves open is as in
    the settings that the MLSAE was `trained` with."""
    dataset: str = config.dataset or trained.get("dataset", "")
    model = config.model or mlsae.config.model
    for name, value in (("DATASET", dataset), ("--model", model)):
        if not value:
            raise InputError(
                f"{name} must be given, since config.json in {config.run} names none, got none"
            )
    # What is given, even if empty; else as in the run, which may know none of it.
    drops: dict[str, Any] = {
        "drop_positions": tuple(trained.get("drop_positions", ())),
        "drop_tokens": tuple(trained.get("drop_tokens", ())),
        "drop_norm": DropRule.from_dict(mlsae.about.get("dropped", {})).norm or "off",
    }
    drops |= {name: given for name in drops if (given := getattr(config, name)) is not None}
    return DataConfig(
        model,
        dataset,
        revision=config.revision or (trained.get("revision") if config.model is None else None),
        trust_remote_code=config.trust_remote_code,  # a run's own file cannot permit it
        eos_token=config.eos_token or (trained.get("eos_token") if config.model is None else None),
        layers=config.layers or mlsae.config.layers or None,
        seq_len=config.seq_len or trained.get("seq_len"),
        **_text_settings(config, trained, dataset),
        token_cache=config.token_cache,
        no_token_cache=config.no_token_cache,
        model_dtype=trained.get("model_dtype", "auto"),
        model_device_map=trained.get("model_device_map"),
        model_quantize=trained.get("model_quantize"),
        **drops,
    )


def _text_settings(config: HeldoutConfig, trained: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Which text of `dataset` to read: as given, else as in the run, else by default. What the run
    says of the parts of its own dataset says nothing of another's."""
    is_own = is_same_place(dataset, trained.get("dataset"))
    names, of_run = (*_PARTS, *_SHARES), _SHARES + (_PARTS if is_own else ())
    given = {n: value for n in names if (value := getattr(config, n)) is not None}
    known = {n: value for n in of_run if (value := trained.get(n)) is not None}
    if dataset == builtin.NAME:
        if config.heldout_share is not None:
            raise InputError(
                f"--heldout_share is for other text than {dataset}, which holds out whole files, "
                f"got {config.heldout_share:g}; leave it out"
            )
    elif is_own:
        # The configuration that is given may be the default one, of which the run has no name.
        own = {"dataset_split": DataConfig.dataset_split} | known
        if all(own.get(n) in (None, given.get(n, own.get(n))) for n in _APART):
            _check_own_text(config, trained)
    return known | given


def _check_own_text(config: HeldoutConfig, trained: dict[str, Any]) -> None:
    """Raise InputError if --heldout_share takes text that the run was trained on, and say so if
    that may be."""
    held_out: float = trained.get("heldout_share", DataConfig.heldout_share)
    if config.heldout_share is not None and config.heldout_share > held_out:
        raise InputError(
            f"--heldout_share must be at most {held_out:g} on the text that {config.run} was "
            f"trained on, since the rest was not held out, got {config.heldout_share:g}; give "
            "less, or another text"
        )
    if "heldout_share" not in trained:
        log_rank0(
            f"{config.run} was trained by an earlier version, which held out other text: some of "
            "the text measured on here may be text that it was trained on"
        )


def is_same_place(name: str, other: str | None) -> bool:
    """Whether two names are of one dataset, model or run: equal, or paths of one local file or
    folder."""
    if other is None or name == other or builtin.NAME in (name, other):
        return name == other
    one, two = os.path.expanduser(name), os.path.expanduser(other)
    return os.path.exists(one) and os.path.exists(two) and os.path.samefile(one, two)
