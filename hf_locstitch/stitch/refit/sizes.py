"""How much a refit looks at together."""

JUDGED = 1 << 26  # numbers of the outputs of a held-out batch, at most: logits can be far more than hidden states
