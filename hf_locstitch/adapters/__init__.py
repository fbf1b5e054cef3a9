"""PEFT adapters as finetuned models: over a base that is never loaded whole, a layer at a time, by PEFT's own code."""
