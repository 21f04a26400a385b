"""A tokenizer without EOS, or with tokens that the model has no embedding of."""

import dataclasses
import json
import re
import shlex
import shutil

import pytest
import tokenizers
import torch
import transformers

from mlsae import builtin
from mlsae.data.config import DataConfig
from mlsae.data.stream import DataStream, read_shape
from mlsae.data.transformer import load_tokenizer
from mlsae.errors import InputError

CPU = torch.device("cpu")
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def with_tokenizer(folder, **special):
    """The built-in model and tokenizer in `folder`, the latter with other special tokens, and text
    of short documents."""
    shutil.copytree(builtin.MODEL_DIR, folder, dirs_exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for name in ("bos_token", "unk_token", "pad_token"):
        setattr(tokenizer, name, None)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    documents = "\n".join(json.dumps({"text": f"def f(x): return {i}"}) for i in range(4000))
    (folder / "text.jsonl").write_text(documents)
    return DataConfig(str(folder), str(folder / "text.jsonl"), seq_len=64, layers=(0,))


def stream_of(settings):
    return DataStream(settings, read_shape(settings), CPU, micro_rows=8, whole=False)


def advised_token(error):
    (token,) = re.findall(r"--eos_token (.+)", str(error.value))
    return shlex.split(token)[0]


def test_a_tokenizer_without_eos_is_refused_and_the_advice_works(tmp_path):
    settings = with_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(InputError, match=r"must have an EOS token, .* has none; name one") as error:
        stream_of(settings)
    token = advised_token(error)
    assert token == "<|endoftext|>"
    stream = stream_of(dataclasses.replace(settings, eos_token=token))
    rows, plain = stream.heldout(640), stream_of(dataclasses.replace(settings, model=builtin.NAME))
    assert torch.equal(rows, plain.heldout(640))
    assert (rows == plain.tokenizer.eos_token_id).any()
    for read, expected in zip(stream.residuals(rows), plain.residuals(rows), strict=True):
        assert torch.equal(read, expected)


@pytest.mark.parametrize(
    ("tokens", "advised"),
    [(["a", "Ċ", "<a>"], "Ċ"), (["\u200b", "it's", "a"], "it's"), (["a", "b", "c", "Ċ"], "a")],
)
def test_an_advised_token_is_the_newline_s_or_any(tokens, advised, tmp_path):
    """If none is special. It is on one line, quoted for a shell, and among the model's 3 tokens."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=tokens[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    transformers.LlamaConfig(vocab_size=3).save_pretrained(tmp_path)
    settings = DataConfig(str(tmp_path))
    with pytest.raises(InputError) as error:
        load_tokenizer(settings)
    assert advised_token(error) == advised
    tokenizer = load_tokenizer(dataclasses.replace(settings, eos_token=advised))
    assert tokenizer.eos_token_id == vocabulary[advised]


def test_an_unknown_eos_token_is_named():
    with pytest.raises(InputError, match=r"--eos_token must be a token .* got '<none>'") as error:
        load_tokenizer(DataConfig(builtin.NAME, eos_token="<none>"))
    assert "such as '<|endoftext|>'" in str(error.value)


@pytest.mark.parametrize("role", ["eos_token", "pad_token", None])
def test_a_token_beyond_the_embedding_is_refused_before_training(role, tmp_path):
    settings = with_tokenizer(tmp_path, **({role: "<added>"} if role else {}))
    if role is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        tokenizer.add_tokens(["<added>"])
        tokenizer.save_pretrained(tmp_path)
    rule = r"ids below 4096 \(the rows of the model's embedding\), and '<added>' has 4096"
    with pytest.raises(InputError, match=rule):
        stream_of(settings)
    # Each of the two ways out.
    resized = tmp_path / "resized"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(resized)
    tokenizer.save_pretrained(resized)
    stream_of(dataclasses.replace(settings, model=str(resized)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(without(content, "<added>")))
    options = {"eos_token": "<|endoftext|>"} if role == "eos_token" else {}
    stream_of(dataclasses.replace(settings, **options))


def without(content, token):
    """JSON without a token."""
    if isinstance(content, dict):
        kept = {k: v for k, v in content.items() if k != token and v != token}
        return {k: without(v, token) for k, v in kept.items()}
    if isinstance(content, list):
        kept = [v for v in content if not (isinstance(v, dict) and v.get("content") == token)]
        return [without(v, token) for v in kept if v != token]
    return content
