"""Carries plans out: opens inputs, finds masks, writes shards, and survives being killed."""
