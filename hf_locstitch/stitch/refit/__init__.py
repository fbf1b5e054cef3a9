"""FittedValues stitching: the values under the masks are fitted, linear by linear, to what the finetuned models compute."""
