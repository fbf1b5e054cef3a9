"""From masks and models to merged values. methods/ has one file per method, stitchers/ one per way to fit values."""
