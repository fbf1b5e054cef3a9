"""The page in a browser: `hf-locstitch ui`, and the Space. Gradio is imported by `app` and `serve` only."""
