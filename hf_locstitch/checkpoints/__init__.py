"""Models on the disk or on the Hub: references, headers, readers, downloads, the writer. Only safetensors are opened."""
