"""What tests share: models made on the spot, references to hold the package to, and ways to run it."""
