"""Statements that can be computed."""
