"""Compiled kernels, one package per backend. Each registers its routes with the engines when imported.

A backend's package must import in milliseconds: it registers routes whose functions import the compiler
and the kernels when they are first called.
"""
