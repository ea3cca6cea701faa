"""qtrain: train on the numeric grid that you deploy. See README.md for the tour."""

__version__ = "0.1.0"
