"""From masks and models to the values of a merge. methods/ has a file for each method, stitchers/ for each fit."""
