"""Components of hf-locstitch in a package of its own, one of each kind."""
