"""Engines: how a perturbation reaches the forward pass."""
