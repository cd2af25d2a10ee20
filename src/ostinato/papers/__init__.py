"""The catalogue of papers: what each claims, the experiment, the verdict."""
