"""What is not a sequence mixer: channel mixers, norms, heads."""
