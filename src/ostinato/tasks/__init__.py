"""Data sets and generators, each with its metric and its baseline."""
