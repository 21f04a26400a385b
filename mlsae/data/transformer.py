"""Load a Hugging Face transformer: its language model, as many of its blocks as are read, in which
dtype, and on which devices; and its tokenizer."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import builtin
from ..errors import InputError, check_installed, first_line
from .config import DataConfig
from .dtypes import dtype_of
from .shortened import shortened_config

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's own words
_USABLE = 0.9  # of a device's free memory, for the weights that accelerate places there
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "[SEP]")


def load_config(config: DataConfig) -> Any:
    """The configuration of the language model in the transformer that `config` names: a small file.

    Raises InputError if it cannot be loaded, or is not that of a decoder-only language model.
    """
    return _load_config(config).get_text_config()


def load_tokenizer(config: DataConfig) -> Any:
    """The tokenizer of the transformer that `config` names; its EOS is `eos_token`, if given.

    Raises InputError if it cannot be loaded, or has no EOS, or no such token.
    """
    with _raise_unloadable(config):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            _path_or_id(config.model), **_hub_options(config)
        )
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise InputError(
                "--eos_token must be a token of MODEL's tokenizer, such as "
                f"{_possible_eos(tokenizer, config)}, got {config.eos_token!r}"
            )
        tokenizer.eos_token = config.eos_token
    if tokenizer.eos_token_id is None:
        raise InputError(
            "MODEL's tokenizer must have an EOS token, which joins documents, and that of "
            f"{config.model} has none; name one of its tokens, for example with "
            f"--eos_token {_possible_eos(tokenizer, config)}"
        )
    return tokenizer


def load_transformer(
    config: DataConfig, device: torch.device, n_layers: int | None = None, reserved: int = 0
) -> Any:
    """The language model that `config` names, without dropout and gradients: a causal one, or one
    that also sees images.

    It is on `device`, the SAE's, or where `model_device_map` puts it, which leaves `reserved` bytes
    of `device` free. It computes in the dtype of `dtype_of`. With `n_layers`, only the first so
    many blocks are loaded, if the architecture allows it (see `shortened_config`), and only
    residuals are read.

    Raises InputError if the model cannot be loaded, or a package that it needs is not installed.
    """
    model_config = _load_config(config)
    options: dict[str, Any] = {
        "dtype": dtype_of(config, model_config, device.type, whole=n_layers is None)
    }
    if config.model_device_map is not None:
        check_installed("accelerate", "--model_device_map")
        _check_device_map(config.model_device_map)
        options["device_map"] = config.model_device_map
        if config.model_device_map in _STRATEGIES:
            options["max_memory"] = _free_memory(device, reserved)
    if config.model_quantize is not None:
        for package in ("accelerate", "bitsandbytes"):
            check_installed(package, "--model_quantize")
        bits = {f"load_in_{config.model_quantize}": True}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
        options.setdefault("device_map", {"": device})  # bitsandbytes forbids moving it later
    trust = {"trust_remote_code": config.trust_remote_code}
    with _raise_unloadable(config):
        auto_class = _auto_class(model_config)
        if n_layers is not None:
            model_config = shortened_config(
                model_config, n_layers, lambda each: auto_class.from_config(each, **trust)
            )
        model, loaded = auto_class.from_pretrained(
            _path_or_id(config.model),
            config=model_config,
            output_loading_info=True,
            **_hub_options(config),
            **options,
        )
    _check_weights(model, loaded["missing_keys"], config)
    if "device_map" not in options:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def empty_transformer(config: DataConfig, n_layers: int) -> Any:
    """The first `n_layers` blocks of the language model that `config` names, as `load_transformer`
    loads them, but on the meta device: shapes without weights, and no file of weights is read.

    Raises InputError if its configuration cannot be loaded.
    """
    model_config = _load_config(config)
    trust = {"trust_remote_code": config.trust_remote_code}
    with _raise_unloadable(config), torch.device("meta"):
        auto_class = _auto_class(model_config)
        short = shortened_config(
            model_config, n_layers, lambda each: auto_class.from_config(each, **trust)
        )
        return auto_class.from_config(short, **trust)


def check_token_ids(tokenizer: Any, model: Any) -> None:
    """Raise InputError if a token of `tokenizer`, added ones included, has no row in the embedding
    of `model`."""
    n_rows = model.get_input_embeddings().weight.shape[0]
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if token_id < n_rows:
        return
    raise InputError(
        f"MODEL's tokenizer must have ids below {n_rows} (the rows of the model's embedding), and "
        f"{token!r} has {token_id}; take the token out of the tokenizer's files, or save the model "
        "after model.resize_token_embeddings(len(tokenizer))"
    )


def _path_or_id(name: str) -> str:
    return str(builtin.MODEL_DIR) if name == builtin.NAME else name


def _hub_options(config: DataConfig) -> dict[str, Any]:
    """What is passed to every call that reads files of the model."""
    if config.revision is not None and (
        config.model == builtin.NAME or Path(config.model).is_dir()
    ):
        raise InputError(
            "--revision must name a version of a model on the Hugging Face hub, and MODEL "
            f"{config.model} is not there, got {config.revision!r}; leave it out"
        )
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    return options if config.revision is None else options | {"revision": config.revision}


def _load_config(config: DataConfig) -> Any:
    """The whole configuration of the transformer that `config` names."""
    with _raise_unloadable(config):
        model_config: Any = transformers.AutoConfig.from_pretrained(
            _path_or_id(config.model), **_hub_options(config)
        )
        text_config = model_config.get_text_config()
    if model_config.is_encoder_decoder:
        raise InputError(
            f"MODEL must be a decoder-only language model, and {config.model} is an "
            f"encoder-decoder ({model_config.model_type})"
        )
    for name in ("num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(text_config, name, None), int):
            raise InputError(
                f"MODEL must be a decoder-only language model, and the configuration of "
                f"{config.model} ({model_config.model_type}) has no {name}"
            )
    return model_config


def _auto_class(model_config: Any) -> Any:
    """The class that loads the language model of a configuration. Models that also see images are
    in another list of transformers; some are in both, as a model of text alone in that of causal
    ones, whose weights have other names than in the files."""
    causal = transformers.AutoModelForCausalLM
    with_images = transformers.AutoModelForImageTextToText
    own_code = getattr(model_config, "auto_map", None) or {}
    is_causal = type(model_config) in causal._model_mapping or causal.__name__ in own_code
    if type(model_config) in with_images._model_mapping:
        own: Any = with_images._model_mapping[type(model_config)]
        saved = own.__name__ in (model_config.architectures or ())
        return with_images if saved or not is_causal else causal
    return with_images if with_images.__name__ in own_code and not is_causal else causal


def _check_weights(model: Any, missing: Any, config: DataConfig) -> None:
    """Raise InputError if weights are `missing` from the model's files: transformers draws them at
    random."""
    absent = sorted(set(missing) & {name for name, _ in model.named_parameters()})
    if absent:
        raise InputError(
            f"MODEL must have all weights of {type(model).__name__}, and {config.model} has no "
            f"{absent[0]} ({len(absent)} are missing)"
        )


def _possible_eos(tokenizer: Any, config: DataConfig) -> str:
    """A token that could end documents and that the model has: one that is known to, or a special
    one, or else the newline's; quoted for a shell."""
    vocabulary, n_rows = tokenizer.get_vocab(), load_config(config).vocab_size
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    in_order = sorted(vocabulary, key=lambda token: vocabulary[token])
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    last = [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in newline]
    for token in (*_ENDS, *tokenizer.all_special_tokens, *added, *last, *in_order):
        if vocabulary.get(token, n_rows) < n_rows and token.isprintable():
            return shlex.quote(token)
    raise InputError(
        f"MODEL's tokenizer must have a token that can be named; that of {config.model} has none"
    )


@contextmanager
def _raise_unloadable(config: DataConfig) -> Iterator[None]:
    """Raise InputError if loading the transformer that `config` names fails."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        if "trust_remote_code" in str(error):
            raise InputError(
                f"MODEL {config.model} needs Python code from its repository; read that code, and "
                "give --trust_remote_code if you trust it"
            ) from error
        name = repr(config.model)
        if config.revision is not None:
            name += f" at revision {config.revision!r}"
        raise InputError(
            f"MODEL must be {builtin.NAME!r}, a local folder, or the name of a causal language "
            f"model on the Hugging Face hub, and {name} cannot be loaded: {first_line(error)}"
        ) from error


def _check_device_map(device_map: str) -> None:
    """Raise InputError if `device_map` is neither a strategy nor a device of this machine."""
    if device_map in _STRATEGIES:
        return
    try:
        torch.empty(1, device=device_map)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--model_device_map must be {', '.join(_STRATEGIES)}, or a device of this machine, "
            f"got {device_map!r}: {first_line(error)}"
        ) from error


def _free_memory(device: torch.device, reserved: int) -> dict[int | str, int]:
    """Bytes that weights may take on each device, by accelerate's name for it."""
    from accelerate.utils import get_max_memory

    sae_device = device.index if device.type == "cuda" else device.type
    usable = {name: int(_USABLE * size) for name, size in get_max_memory().items()}
    return {name: max(0, size - reserved * (name == sae_device)) for name, size in usable.items()}
