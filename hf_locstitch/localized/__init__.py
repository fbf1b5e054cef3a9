"""Localized checkpoints: one finetune cut down to its mask and the values under it, to be stitched later."""
