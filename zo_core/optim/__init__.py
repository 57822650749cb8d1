"""Zeroth-order optimizers: each method is a short file that chooses parts."""
