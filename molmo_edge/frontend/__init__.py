"""From an image and a question to arrays: image files, overlapping crops, tokens, prompts, points."""
