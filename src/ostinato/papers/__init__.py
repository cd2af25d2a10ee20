"""The catalogue: the 82 systems, what each claims, the experiment, and the verdict.

    ostinato.papers.catalogue.systems()      every record
    ostinato.papers.runner.reproduce(1)      run one experiment, write reports/01/

A paper's module is `papers/pNN_name.py`: its `claims` and its `experiment(run)`, nothing else; see `runner`.
"""
