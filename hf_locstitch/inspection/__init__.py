"""Reading finished merges and localized checkpoints: what they say of themselves, and whether all of it is so."""
