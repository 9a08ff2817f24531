"""What latents mean: where they fire, explanations and their scores, directions, pages,
blind ratings."""
