"""Localized checkpoints and merges in the forms of other libraries."""
