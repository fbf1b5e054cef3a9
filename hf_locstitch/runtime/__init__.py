"""Shared foundations: settings, threads and processes, dtypes, files, progress. Knows nothing about models."""
