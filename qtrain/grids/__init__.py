"""Which values can the runtime represent? One file per family of grids; `base.py` says what a grid is."""
