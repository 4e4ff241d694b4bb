"""Systems beside the tiered one, each a difference at a seam: model, routing or mixing."""
