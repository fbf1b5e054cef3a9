"""Figures of a merge, each as PNG and SVG, with its data as CSV or JSON beside it."""
