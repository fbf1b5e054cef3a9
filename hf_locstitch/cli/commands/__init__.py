"""The sub-commands, one file each: `add` says what flags there are, `run` does it and returns the exit status."""
