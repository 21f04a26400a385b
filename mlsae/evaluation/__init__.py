"""Evaluation on held-out text: what reconstructions keep of residuals and predictions."""
