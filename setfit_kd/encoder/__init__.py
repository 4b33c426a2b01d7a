"""Training of sentence encoders on labeled sentence pairs or from a larger encoder."""
