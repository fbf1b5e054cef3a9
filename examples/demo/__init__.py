"""Tiny models trained in a minute, and a Hugging Face Hub on loopback to publish them to."""
