"""Finding the mask of each finetuned model. localizers/ has one file per localizer; selection.py is the exact top k."""
