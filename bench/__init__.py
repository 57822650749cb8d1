"""One script a question, each with a correctness gate before any figure: ``python -m bench.passes --help``."""
