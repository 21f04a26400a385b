"""Evaluation on held-out text: how faithful reconstructions are to residuals and predictions."""
