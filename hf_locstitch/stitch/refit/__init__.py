"""Fitting values, linear by linear, to what the finetuned models compute on inputs: for refits and RegMean."""
