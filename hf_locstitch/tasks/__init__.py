"""Localization sets, and what a model is trained or tested on with them: one file per objective."""
