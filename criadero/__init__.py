"""Raise your own Llama, in the open, on your own machine."""

__version__ = "0.1.0"
