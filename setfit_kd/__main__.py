"""Entry point of ``python -m setfit_kd``."""

from setfit_kd.cli import main

main(prog_name="setfit-kd")
