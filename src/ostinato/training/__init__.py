"""The training loop and the learning rules that plug into it.

`fit` is the loop; `plugs` are its three open places (objective, gradient, curriculum); `checkpoints` is what lies on
the disk; `evaluate` scores a model on a task's test set.
"""
