"""Measurements of fedpeft, one module each: `python -m benchmarks.NAME`. They print a table and keep a JSON record."""
