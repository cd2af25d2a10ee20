"""Engines: pure functions on tensors, one per algebraic class of recurrence."""
