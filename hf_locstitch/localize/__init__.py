"""Finding the mask of each finetuned model. One file a localizer; selection.py keeps the best k exactly."""
