"""Everything that measures: the benchmark, the paper's experiments, training recipes, and the comparison of methods."""
