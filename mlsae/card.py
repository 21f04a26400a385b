"""The model card of an MLSAE: README.md, as the Hugging Face hub shows it.

Legend: R = n_latents / d_in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from . import builtin
from .data.sinks import DropRule

PAPER = "https://arxiv.org/abs/2409.04185"
_CITATION = """```bibtex
@inproceedings{lawson2025residual,
  title     = {Residual Stream Analysis with Multi-Layer {SAEs}},
  author    = {Lawson, Tim and Farnik, Lucy and Houghton, Conor and Aitchison, Laurence},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2409.04185}
}
```"""


def model_card(settings: dict[str, Any]) -> ModelCard:
    """The card of the MLSAE whose `config.json` holds `settings`.

    It names no license: that depends on the model and the text, and is left to the publisher.
    """
    training = settings.get("training", {})
    model, dataset = settings.get("model", ""), training.get("dataset", "")
    data = ModelCardData(
        base_model=model if _on_the_hub(model) else None,
        datasets=[dataset] if _on_the_hub(dataset) else None,
        library_name="mlsae",
        tags=["arxiv:2409.04185", "interpretability", "mlsae", "sparse-autoencoder"],
    )
    layers = settings.get("layers", ())
    number, more = how_many_active(settings)
    codes = "k" if settings.get("k_max") is None else "k_max"
    lens = settings.get("lens")
    shape, given = ("(…, d_in)", "") if lens is None else ("(layers, …, d_in)", ", layers")
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# A multi-layer SAE of {_named(model)}",
        f"One TopK sparse autoencoder for the residual stream of {_named_layers(layers)} "
        f"([Lawson et al., ICLR 2025]({PAPER})): {settings['n_latents']:,} latents, "
        f"{number} of them active for each token and layer{more}.",
        "```python\nfrom mlsae import MLSAE\n\n"
        'mlsae = MLSAE.from_pretrained("this repository")\n'
        f"values, indices = mlsae.encode(residuals{given})  # {shape} → (…, {codes})\n"
        f"x_hat = mlsae(residuals{given})\n```",
        *([] if lens is None else [_of_lens(lens)]),
        "## Settings",
        _table(("setting", "value"), _settings(settings)),
    ]
    if heldout := settings.get("heldout"):
        heading = f"## Validation: {heldout['n_tokens']:,} held-out tokens"
        parts += [heading, _metrics(heldout, layers)]
    return ModelCard("\n\n".join([*parts, "## Citation", _CITATION]) + "\n")


def _of_lens(lens: dict[str, Any]) -> str:
    return (
        f"It works in the basis of the last layer, into which a lens ({lens.get('kind')}) carries "
        "the residuals of each layer, and from which reconstructions are carried back; "
        "`lens.safetensors` holds its maps. So the methods are told the layers of `residuals`."
    )


def _on_the_hub(name: str) -> bool:
    """Whether `name` can be a name on the hub: neither built in nor a local file."""
    return bool(name) and name != builtin.NAME and not Path(name).exists() and name.count("/") <= 1


def _named(model: str) -> str:
    return "the built-in model" if model == builtin.NAME else model or "a transformer"


def layer_range(layers: Sequence[int]) -> str:
    """Layers in words: "0 to 5", or "1, 3, 4"."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def how_many_active(settings: dict[str, Any]) -> tuple[str, str]:
    """How many latents are active, and what is to be said after it by batchtopk and jumprelu; the
    files of a JumpReLU SAE need not tell more than how many a code has room for."""
    k, k_max = settings["k"], settings.get("k_max")
    if k_max is None:
        return f"{k:,}", ""
    if settings.get("activation") != "jumprelu":
        return f"{k:,}", f" in the mean, {k_max:,} at most (BatchTopK)"
    if k == k_max:
        return f"at most {k_max:,}", " (JumpReLU)"
    return f"{k:,}", f" in the mean, {k_max:,} at most (JumpReLU)"


def _named_layers(layers: Sequence[int]) -> str:
    plural = "s" if len(layers) > 1 else ""
    return f"layer{plural} {layer_range(layers)}" if layers else "every layer"


def _settings(settings: dict[str, Any]) -> list[tuple[object, ...]]:
    """Rows: what it is, then every setting of its training, then the versions."""
    d_in, n_latents = settings["d_in"], settings["n_latents"]
    more = [name for name in ("k_max", "threshold") if settings.get(name) is not None]
    rows: list[tuple[object, ...]] = [
        ("d_in", d_in),
        ("n_latents", f"{n_latents} ({n_latents / d_in:g} × d_in)"),
        ("k", settings["k"]),
        *((name, settings[name]) for name in more),
        ("standardize", settings["standardize"]),
        ("model", settings.get("model") or "not known"),
    ]
    training = dict(settings.get("training", {}))
    # Shown above, or of one machine only.
    for name in ("model", "out", "overwrite", "resume", "moved", "push_to_hub"):
        training.pop(name, None)
    training |= {f"sae.{name}": value for name, value in training.pop("sae", {}).items()}
    for name, value in training.items():
        if value is not None:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            rows.append((f"`--{name}`", shown))
    if dropped := str(DropRule.from_dict(settings.get("dropped", {}))):
        rows.append(("left out beside special tokens", dropped))
    return rows + [(f"{name} (version)", v) for name, v in settings.get("versions", {}).items()]


def _metrics(heldout: dict[str, Any], layers: Sequence[int]) -> str:
    """A row per layer, and one of their mean."""
    names = {"fvu": "FVU", "fvu_paper": "FVU as in the paper", "l0": "L0"}
    names["fvu_lens"] = "FVU in the lens's basis"  # if there is one
    names["fvu_all"] = "FVU with the tokens left out"  # if there are any
    columns = [name for name in names if f"{name}_layers" in heldout]
    rows: list[tuple[object, ...]] = [
        (layer, *(f"{heldout[f'{name}_layers'][i]:.4f}" for name in columns))
        for i, layer in enumerate(layers)
    ]
    rows.append(("mean", *(f"{heldout[name]:.4f}" for name in columns)))
    return _table(("layer", *(names[name] for name in columns)), rows)


def _table(heading: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
