"""What other tools read of a run, and what they write about its latents."""
