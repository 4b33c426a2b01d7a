"""Tasks: what differs between kinds of classification."""
