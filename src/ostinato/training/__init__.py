"""The training loop and the learning rules that plug into it."""
