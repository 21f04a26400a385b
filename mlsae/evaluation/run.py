"""Evaluate an MLSAE on held-out text.

Legend: L layers.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from ..bootstrap import Interval, without_interval
from ..data.sinks import DropRule
from ..data.tokens import not_special
from ..distributed import choose_device
from ..files import EVALUATION_FILES, check_folder, write_file
from .faithfulness import Faithfulness, measure_faithfulness
from .heldout import HeldoutConfig, check_kept, open_run
from .joint import Joint
from .patching import check_substitution
from .provenance import provenance_of
from .result import EvaluationResult
from .token_metrics import JOINT_METRICS, append_mean, bootstrap_token_metrics

_CHECKED_POSITIONS = 32  # of one row: enough to see whether the model can run on from a residual


@dataclass(frozen=True)
class EvaluateConfig(HeldoutConfig):
    """What to measure, and on what; evaluation.csv and evaluation.json hold the result."""

    joint: Joint = "from"
    """Replace several layers at once, too. from: each layer with all above it, which takes L − 1
    more partial passes of the model and L (L − 1) / 2 more reconstructions of the text; all: all
    layers, one pass; off: none."""


def evaluate(config: EvaluateConfig, drop: DropRule | None = None) -> EvaluationResult:
    """Measure as `config` says, and write evaluation.csv and evaluation.json. With `drop`, just
    that is left out, whatever `config` says.

    Raises InputError for bad input, before anything is measured.
    """
    started = time.perf_counter()
    device, out = choose_device(config.device), config.out or config.run
    check_folder(out, files=EVALUATION_FILES)
    mlsae, stream = open_run(config, device, drop)
    input_ids = stream.heldout(config.tokens)
    text_mask = not_special(input_ids, stream.tokenizer)
    token_mask = stream.token_mask(input_ids)
    check_kept(token_mask, text_mask)
    check_substitution(stream.reader, input_ids[:1, :_CHECKED_POSITIONS].to(device))
    out.mkdir(parents=True, exist_ok=True)
    measured = measure_faithfulness(
        mlsae, stream.reader, input_ids, token_mask, stream.micro_rows, text_mask, config.joint
    )
    metrics = _metrics(measured, config.resamples, stream.seed)
    if config.joint == "off":
        metrics = {name: metrics[name] for name in metrics if name not in JOINT_METRICS}
    sums = measured.sums
    interval = f"95 %, {config.resamples} bootstrap resamples of the rows"
    result = EvaluationResult(
        provenance_of(config.run, mlsae, stream, token_mask, text_mask, interval, started),
        metrics,
        predictions=int(sums.predictions.sum()),
        ce_true=(sums.ce_true.sum() / sums.predictions.sum()).item(),
        dead_at_every_layer=(~measured.active.any(1)).double().mean().item(),
    )
    write_file(out / "evaluation.csv", result.as_csv().encode())
    write_file(out / "evaluation.json", json.dumps(result.as_dict(), indent=2).encode())
    return result


def _metrics(measured: Faithfulness, resamples: int, seed: int) -> dict[str, Interval]:
    """All metrics by name, (L + 1,) each. Some are not means over tokens and have no interval:

    dead       the share of latents with h ≤ 1e-3 (`model.ACTIVE`) at every token of the layer
    pca        `metrics.pca_explained` by k components of the layer's own
    top_share  `metrics.top_share`
    fvu_all    `metrics.fvu` with the dropped tokens that are not special, if there are any
    fvu_lens   `metrics.fvu` in the basis of the lens, if there is one
    """
    dead = (~measured.active).double().mean(0)
    computed = {
        **bootstrap_token_metrics(measured.sums, resamples, seed),
        "dead": without_interval(append_mean(dead).cpu()),
        "pca": without_interval(append_mean(measured.pca).cpu()),
        "top_share": without_interval(append_mean(measured.top_share).cpu()),
    }
    for name, value in (("fvu_all", measured.fvu_all), ("fvu_lens", measured.fvu_lens)):
        if value is not None:
            computed[name] = without_interval(append_mean(value).cpu())
    return computed
