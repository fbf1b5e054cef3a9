"""Localization sets and what a model is asked of them: one file an objective."""
