"""Try every architecture of the installed transformers that has a causal text side, as a small
random model, and write which ones can be read: docs/architectures.md.

    python -m scripts.architectures                      # all: a few minutes on one core
    python -m scripts.architectures --only llama mamba   # some: prints, and writes nothing

Each model is built from its configuration class, without a network. Checked against hooks written
here: the residuals of all layers, and of some; against transformers' own hidden states, where it
gives them; that a model loaded up to a layer gives the same; and that the logits do not change if
each layer's residual is substituted by itself, which ΔCE needs.

Legend: L layers, B rows, T positions, D width of the residual stream.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from mlsae.data.config import DataConfig
from mlsae.data.residuals import ResidualReader
from mlsae.data.transformer import load_transformer
from mlsae.errors import InputError
from mlsae.evaluation.patching import check_substitution
from scripts.small_config import VOCABULARY, small_config

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
CPU = torch.device("cpu")
_SECONDS = 60  # for one architecture
_PARAMETERS = 150_000_000  # of a small model: its vision tower may keep its size

OK, NO_DELTA_CE, REFUSED = "ok", "read, without ΔCE", "refused"
NOT_BUILT, WRONG = "cannot be built small", "wrong"


class Result(NamedTuple):
    """What came of an architecture."""

    name: str
    status: str
    """OK, NO_DELTA_CE, REFUSED, NOT_BUILT or WRONG."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


class NotBuiltError(Exception):
    """An architecture cannot be built small."""


def names() -> list[str]:
    """The model types that transformers lists as causal language models, or as models that read
    images and text."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted({*causal, *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def try_guarded(name: str) -> Result:
    """`try_architecture` in a process of its own, which is ended after a minute."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(name, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(_SECONDS):
            return receiver.recv()
        return Result(name, NOT_BUILT, f"it takes longer than {_SECONDS} seconds")
    except EOFError:
        return Result(name, WRONG, "the process ended")
    finally:
        process.kill()
        process.join()


def _send_result(name: str, sender: Connection) -> None:
    sender.send(try_architecture(name))


def try_architecture(name: str) -> Result:
    """Build a small model of the type `name`, save it, and read it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(name).save_pretrained(folder)
        except Exception as error:  # any code of any architecture
            return Result(name, NOT_BUILT, _one_line(error))
        try:
            return read(name, folder)
        except InputError as error:
            return Result(name, REFUSED, str(error).replace(folder, "the model"))
        except Exception as error:
            return Result(name, WRONG, _one_line(error))


def build(name: str) -> Any:
    """A small random model of the type `name`, as its files on the hub would give it."""
    config = small_config(name)
    encoder_decoder = config.is_encoder_decoder  # which the decoder alone sets to False
    torch.manual_seed(0)
    for auto_class in (
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForCausalLM,
    ):
        if type(config) in auto_class._model_mapping:
            model = auto_class.from_config(config).eval()
            if model.num_parameters() > _PARAMETERS:
                raise NotBuiltError(f"it has {model.num_parameters():,} parameters")
            model.config.is_encoder_decoder = encoder_decoder
            return _without_zeros(model)
    raise NotBuiltError("transformers maps its configuration to no model")


@torch.no_grad()
def _without_zeros(model: Any) -> Any:
    """The model, with random numbers for weights that begin as zeros and would hide what a block
    does."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.any():
            parameter.normal_(std=0.1)
    return model


def read(name: str, folder: str) -> Result:
    """Check what is read of the model in `folder`. Raises InputError if it cannot be read."""
    config = DataConfig(folder, model_dtype="float32")  # for both to compute in
    whole = load_transformer(config, CPU)
    reader = ResidualReader(whole)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, VOCABULARY - 20, (2, 8), generator=generator)
    expected = hooked(whole, reader.blocks, input_ids)
    if not all(same(reader(input_ids), expected) for _ in range(2)):
        return Result(name, WRONG, "residuals differ from those of hooks")
    if not fits_hidden_states(whole, input_ids, expected):
        return Result(name, WRONG, "residuals differ from the hidden states of transformers")
    some = [0, len(expected) // 2]
    part = ResidualReader(load_transformer(config, CPU, some[-1] + 1), some)
    if not same(part(input_ids), expected[some]):
        return Result(name, WRONG, "residuals of a model loaded in part differ")
    try:
        check_substitution(reader, input_ids)
    except InputError as error:
        return Result(name, NO_DELTA_CE, str(error))
    return Result(name, OK, "" if len(part.blocks) == some[-1] + 1 else "all blocks are loaded")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to float32's rounding."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@torch.no_grad()
def hooked(model: Any, blocks: Sequence[nn.Module], input_ids: Tensor) -> Tensor:
    """Outputs (L, B, T, D) of `blocks`, by hooks that let the model run to its end."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda _module, _args, output: seen.append(
                output if isinstance(output, Tensor) else output[0]
            )
        )
        for block in blocks
    ]
    model(input_ids=input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@torch.no_grad()
def fits_hidden_states(model: Any, input_ids: Tensor, residuals: Tensor) -> bool:
    """Whether `residuals` (L, B, T, D) are the hidden states of transformers: L + 1 of them, which
    begin with the embeddings, or after the first block, and end after the final norm. True if it
    gives none, or another number."""
    output = model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states or len(states) != len(residuals) + 1:
        return True
    after_embeddings, after_first = torch.stack(states[1:-1]), torch.stack(states[:-1])
    return same(after_embeddings, residuals[:-1]) or same(after_first, residuals)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def page(results: Iterable[Result]) -> str:
    """The page of the documentation."""
    results = list(results)
    counts = Counter(result.status for result in results)
    shown = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    rows = (f"| {r.name} | {str(r).replace('|', '/').replace('<', '&lt;')} |" for r in results)
    return f"""# Architectures

What `python -m scripts.architectures` found with transformers {transformers.__version__}: every
architecture that it lists as a causal language model or as one that also reads images, built small
with random weights. {len(results)} in all: {shown}.

- **{OK}**: the residuals of all layers and of some are those of hooks and of transformers' own
  hidden states; a model loaded up to a layer gives the same; and each residual, substituted by
  itself, leaves the logits as they are, so ΔCE can be measured. With "all blocks are loaded",
  `--layers` saves no memory.
- **{NO_DELTA_CE}**: `mlsae.train` and `mlsae.analyze` work, and `mlsae.evaluate` refuses the model.
- **{REFUSED}**: with this sentence, before training.
- **{NOT_BUILT}**: not tried, so nothing is known.

A small random model shows that the blocks are found and read. It cannot show that a released model
is loaded well; all of its weights must be in its files, or it is refused.

| model type | result |
|---|---|
{chr(10).join(rows)}
"""


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="TYPE", choices=names())
    only = parser.parse_args().only
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # more would not outlive the fork
    results = []
    for name in only or names():
        results.append(try_guarded(name))
        print(f"{name:28} {results[-1]}", flush=True)
    if not only:
        PAGE.write_text(page(results))
        print(f"written: {PAGE}")
    sys.exit(any(result.status == WRONG for result in results))


if __name__ == "__main__":
    main()
