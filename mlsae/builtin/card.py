"""The model card of the built-in model: a template, kept apart from the code that measures its
values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [gpt_neox, code]
---

# The built-in language model

A GPT-NeoX of 6 layers and {parameters:,} parameters that models Python source code. It exists so
that a multi-layer sparse autoencoder can be trained on a real language model with no network; it is
too small to be useful for anything else.

| | |
|---|---|
| held-out loss | {heldout_loss:.3f} nats per token |
| interpolated bigram, same tokens | {bigram_loss:.3f} nats per token |
| held-out loss without codec tables | {loss_without_tables:.3f} nats per token: the library's \
tables of character codes are long and easy to predict |
| held-out loss without near-copies | {loss_without_copies:.3f} nats per token: {n_copies} of the \
{n_heldout} held-out files have a modified copy among the other sources |
| held-out text | {heldout_tokens:,} tokens: a tenth of the files of Python {python}'s standard \
library, chosen by the CRC-32 of their paths |
| training text | {train_tokens:,} tokens: {library_epochs} passes over the library's other files \
({library_tokens:,} tokens), the rest from other Python sources |
| other sources | {sources} |
| tokenizer | byte-level BPE of 4,096 tokens, trained on the library's training files |
| recipe | {recipe} |
| time | {hours:.1f} hours on {device} |
| weights | bfloat16, safetensors; embeddings tied |

The losses are of the shipped bfloat16 weights, over consecutive rows of 512 tokens of held-out
files joined by the end-of-text token. Train it anew with `python -m mlsae.builtin --out FOLDER`.

License: the weights are under this project's MIT license. The training text is under the licenses
of its sources (PSF-2.0 for the standard library; BSD, MIT and Apache-2.0 for the others) and is not
distributed with the model.
"""


def write_card(folder: Path, values: dict[str, Any]) -> None:
    """Write `README.md`, the template filled in with `values`, into the model's folder."""
    text = _CARD.format(**values)
    (folder / "README.md").write_text(text, encoding="utf-8")
