"""Analysis: at which layers latents are active, and for what tokens."""
