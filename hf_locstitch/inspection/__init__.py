"""Reading finished merges and localized checkpoints: what they record about themselves, and whether it is true."""
