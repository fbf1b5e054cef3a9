"""Merges of the same finetunes by several methods and settings, judged side by side, and the best of them."""
