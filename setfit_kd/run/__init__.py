"""A whole run: stages, their cached results, and the pipeline that connects them."""
