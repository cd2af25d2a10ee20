"""Circuits used as recurrent cells."""
