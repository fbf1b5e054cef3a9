"""Reading a finished merge back: its files against the manifest, its masks, its values against the inputs."""
