"""Data sets and generators, each with its metric, its baselines and its seed.

    task = ostinato.task("word_problem", group="S3")
    batch = task.train_batch(step=0, batch_size=32, seed=0)

This room stands alone: it knows nothing of models. See `base` for what a task is, `registry` for the names.
"""
