"""Finetuning: a base and examples in, a checkpoint that merges take out."""
