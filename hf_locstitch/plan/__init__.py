"""From a recipe to a plan: pure data made from headers, before any weight is read."""
