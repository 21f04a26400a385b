"""What an analysis prints: the spread over layers by both estimators, the layers, the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_analysis(about: dict[str, Any], out: Path, wanted_tokens: int) -> None:
    """Print what analysis.json holds, and where in `out` the rest is."""
    console = Console(highlight=False)
    mmcs, embeddings = about["mmcs"], about["embeddings"]
    in_all = about["rows"] * about["seq_len"]
    if in_all < wanted_tokens // about["seq_len"] * about["seq_len"]:
        console.print(f"the held-out text has no more than {in_all:,} tokens")
    console.print(*_tables(about), sep="\n")
    console.print(
        "L the layer, J a latent, T a token; A = E[Var(L | J)] / Var(L): the spread left within a "
        "latent; B = E[Var(L | J, T)] / E[Var(L | J)]: what of that is left for one token; beside "
        "them 95% bootstrap intervals",
        f"{about['active_latents']:,} of {about['n_latents']:,} latents active; largest cosine to "
        f"another latent {mmcs['value']:.3f} on average (MMCS), of random directions "
        f"{mmcs['random']:.3f}",
        "largest cosine to a token's embedding, on average: "
        + ", ".join(
            f"{name} {value:.3f}" if value is not None else f"{name}: of another width"
            for name, value in (("input", embeddings["in"]), ("output", embeddings["out"]))
        ),
        f"analyzed in {about['seconds']:.0f} s, of it {about['pass_seconds']:.0f} s over the text "
        f"({about['tokens'] / about['pass_seconds']:,.0f} tokens/s)",
        f"peak memory: {about['peak_bytes'] / 1e9:.2f} GB",
        f"{about['examples']:,} examples: {out / 'analysis_examples.parquet'}",
        f"latents: {out / 'analysis_latents.parquet'}",
        f"figures: {out / 'analysis.json'}, {out / 'analysis.safetensors'}",
        sep="\n",
        soft_wrap=True,
    )


def _tables(about: dict[str, Any]) -> tuple[Table, Table]:
    """To print: the spread over layers by both estimators, and what is found at each layer."""
    spread = Table(title=f"Spread over layers: {about['tokens']:,} held-out tokens")
    for heading in ("", "paper's equations", "its released code"):
        spread.add_column(heading, justify="right" if heading else "left")
    ratios = about["ratios"]
    for name, label in (
        ("var_layer", "Var(L)"),
        ("var_given_latent", "E[Var(L | J)]"),
        ("var_given_latent_token", "E[Var(L | J, T)]"),
        ("A", "ratio A"),
        ("B", "ratio B"),
    ):
        both = (_with_ends(ratios[estimator][name]) for estimator in ("equations", "released"))
        spread.add_row(label, *both)
    spread.add_section()
    for name, label in (
        ("profile", "entropy / ln L"),
        ("totals", "of summed activation"),
    ):
        spread.add_row(label, _with_ends(about["entropy"][name]), "")
    layers = Table(title="Residuals, about their mean")
    for heading in ("layer", "norm", "cosine with the next"):
        layers.add_column(heading, justify="right")
    norms = about["adjacent"]["norm"]
    cosines = [f"{cosine:.3f}" for cosine in about["adjacent"]["cosine"]]
    for layer, norm, cosine in zip(about["layers"], norms, [*cosines, ""], strict=True):
        layers.add_row(str(layer), f"{norm:.2f}", cosine)
    return spread, layers


def _with_ends(figure: float | dict[str, float | None] | None) -> str:
    """A figure, and its interval where it has one."""
    if not isinstance(figure, dict):
        return "–" if figure is None else f"{figure:.4f}"
    low, high = figure["low"], figure["high"]
    ends = "" if low is None or high is None else f" [dim]{low:.4f} … {high:.4f}[/dim]"
    return _with_ends(figure["value"]) + ends
