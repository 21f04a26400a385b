"""Analysis: at which layers latents are active, and what they stand for."""
