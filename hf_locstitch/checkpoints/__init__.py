"""Models on the disk or on the Hub: references, headers, readers, downloads, the writer. Of safetensors only."""
