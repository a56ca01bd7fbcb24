"""The published methods: formulas, their sources, and the side of the truth on which they stand."""
