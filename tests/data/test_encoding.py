"""Texts to token ids, against the tokenizer's own call."""

import transformers

from mlsae import builtin
from mlsae.data.encoding import encoder


def test_fast_and_slow_tokenizers_give_what_a_call_gives():
    """With an added token, a normalizer, and the truncation and padding of a former call."""
    from tokenizers import normalizers

    class Slow:
        def __call__(self, texts, **_):
            return {"input_ids": [[len(text)] for text in texts]}

    fast = transformers.AutoTokenizer.from_pretrained(builtin.MODEL_DIR)
    fast.add_tokens(["def f", "EOT"])
    fast.pad_token = fast.eos_token
    fast.backend_tokenizer.normalizer = normalizers.Lowercase()
    texts = ["def f(): RETURN\n" * 20, "", "ünïcode EOT <|endoftext|>", "x"]
    expected = fast(texts, add_special_tokens=False)["input_ids"]
    fast(texts, truncation=True, max_length=4, padding="max_length")
    assert [ids.tolist() for ids in encoder(fast)(texts)] == expected
    assert [ids.tolist() for ids in encoder(Slow())(["ab", "c"])] == [[2], [1]]
