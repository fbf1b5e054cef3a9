"""Scores of language models through lm-eval: several side by side, kept by content, written into the card."""
