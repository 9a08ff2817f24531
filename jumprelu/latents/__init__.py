"""What latents mean: where they fire, explanations and their scores, directions, attribution,
pages, blind ratings."""
