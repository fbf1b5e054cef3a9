"""Scores of language models through lm-eval: several side by side, cached by content, written into the model card."""
