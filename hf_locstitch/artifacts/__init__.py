"""What a merge leaves behind: manifest, mask files, localized checkpoints, and how masks overlap."""
