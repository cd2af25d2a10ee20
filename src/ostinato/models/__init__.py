"""Whole networks, one file per job."""
