"""Sequence mixers: a module is projections and one engine."""
