"""Where the examples come from: one file per dataset; all of them go through `qtrain.text`, which makes the splits."""
