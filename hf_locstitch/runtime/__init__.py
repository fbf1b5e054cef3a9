"""What all parts stand on: settings, threads and processes, dtypes, files, progress. Knows nothing of models."""
