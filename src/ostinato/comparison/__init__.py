"""Comparisons: any set of mixers over any set of tasks and seeds, cell by cell, side by side.

A cell is one mixer trained on one task from one seed; it is kept in a file of its own, and no cell knows of another.
`grid` runs cells in processes, `board` reads them back and draws the page, `linear` is the one table that the package
keeps of what each linear recurrence can do. The command line is `ostinato compare`.
"""
