"""From masks and models to the values of a merge. methods/ has one file a method, stitchers/ one a way to fit values."""
