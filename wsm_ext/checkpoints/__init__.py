"""Checkpoints: files of weights, what parameters are made of them, and whether they are whole."""
