"""Where the model comes from: one file per family (how to build it, what stays in float, its blocks in order)."""
