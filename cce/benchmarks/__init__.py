"""Measures every backend and its peers on the heads of real models: ``python -m cce bench``.

Read in this order: ``shapes`` and ``heads`` (what is computed on), ``candidates`` and ``peers`` (what computes it),
``oracle`` (what is right), ``timing`` and ``measure`` (a row of the record), ``studies`` (which rows), ``record``,
``table`` and ``plots`` (what becomes of them).
"""
