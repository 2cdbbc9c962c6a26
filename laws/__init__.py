"""Scaling laws: formulas, fits, plans, and the sweeps and studies that give their data."""
