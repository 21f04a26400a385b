"""A page on this machine to explore trained MLSAEs: prompts, steering, latents and what a user
writes about them. Importing this needs no torch, so that the page answers before torch has come."""
