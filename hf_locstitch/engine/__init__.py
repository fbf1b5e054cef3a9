"""Carries plans out: opens inputs, finds masks, writes shards, and resumes killed runs."""
