"""Masked language modeling: pretraining on texts, added vocabulary and distillation."""
