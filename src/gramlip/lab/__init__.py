"""Everything that measures: the benchmark, the paper's experiments, training recipes, and methods compared."""
