"""Instruments for trained networks."""
