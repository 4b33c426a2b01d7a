"""Bodies, heads and SetFit models: locate, load, run and save them."""
