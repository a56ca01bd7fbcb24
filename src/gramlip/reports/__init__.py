"""Reading files of weights, and writing reports."""
