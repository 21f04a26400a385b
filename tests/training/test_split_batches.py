"""Batches split in parts train as whole ones do: gradients, and every metric."""

from scripts import split_batches


def test_gradients_and_metrics_are_those_of_whole_batches():
    """To rounding, which may decide which latent is k-th: far less than what a part weighed
    wrongly would move."""
    largest, with_aux = split_batches.compare(4, (3,))
    assert with_aux > 0, "no latent died, so AuxK was not tried"
    found = largest["3 parts"]
    assert {"gradient of W_enc", "gradient of b_dec", "loss", "aux", "held-out l0"} < found.keys()
    assert max(found.values()) < 0.02, found
