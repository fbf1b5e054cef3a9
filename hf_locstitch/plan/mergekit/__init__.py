"""Configs of mergekit read as recipes: config.py checks their form, methods.py lists methods and parameters,
translate.py makes the recipes."""
