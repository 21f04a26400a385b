"""Read an exported cache by delphi's own LatentDataset, and let delphi make examples of it.

    PYTHON tests/helpers/peer_delphi.py CACHE OUT

It runs in delphi's environment, without our code. CACHE is the folder exported; OUT.safetensors
then has, for each hookpoint, what delphi has read: `HOOKPOINT.locations` (n, 3), with latents
numbered from 0, and `HOOKPOINT.activations` (n,); and `tokens` (R, T).

Legend: R rows, T positions.
"""

import asyncio
import sys
from pathlib import Path

import torch
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset
from safetensors.torch import save_file


class Tokenizer:
    """Stands in for the model's, which needs the network."""

    def batch_decode(self, tokens, **_):
        return [str(token) for token in tokens]

    def decode(self, tokens, **_):
        return str(tokens)

    def convert_ids_to_tokens(self, tokens):
        return [str(token) for token in tokens]


def main(cache, out):
    hookpoints = sorted(path.name for path in cache.iterdir())
    sizes = {"n_examples_train": 4, "n_examples_test": 4, "n_quantiles": 2}
    constructor = ConstructorConfig(example_ctx_len=16, min_examples=8, n_non_activating=4)
    dataset = LatentDataset(
        cache, SamplerConfig(**sizes), constructor, tokenizer=Tokenizer(), modules=hookpoints
    )
    read = {name: ([], []) for name in hookpoints}
    for buffer in dataset.buffers:
        locations, activations, _ = buffer.load()
        read[buffer.module_path][0].append(locations)
        read[buffer.module_path][1].append(activations)
    tensors = {"tokens": dataset.tokens}
    for name, (locations, activations) in read.items():
        tensors[f"{name}.locations"] = torch.cat(locations)
        tensors[f"{name}.activations"] = torch.cat(activations).float()
    save_file({name: t.contiguous() for name, t in tensors.items()}, out)

    async def records():
        return [record async for record in dataset if record is not None]

    found = asyncio.run(records())
    assert all(record.train for record in found)
    active = {str(record.latent) for record in found}
    print(f"{len(active)} latents with examples to explain")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
