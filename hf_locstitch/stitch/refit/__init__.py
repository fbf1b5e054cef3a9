"""Fitting values, layer by layer, to what the finetuned models compute on inputs: for refits and RegMean."""
