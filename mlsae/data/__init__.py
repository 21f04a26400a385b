"""Text, tokens and residuals: what an SAE trains on."""
