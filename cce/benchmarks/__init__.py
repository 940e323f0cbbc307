"""Benchmark of every backend and its peers on the heads of real models: ``python -m cce bench``.

Read in this order: ``shapes`` and ``heads`` (the problems), ``candidates`` and ``peers`` (the implementations),
``oracle`` (the correct results), ``timing`` and ``measure`` (one row of the record), ``studies`` (the choice of rows),
``record``, ``table`` and ``plots`` (their storage and display).
"""
