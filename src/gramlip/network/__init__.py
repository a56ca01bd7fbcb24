"""The Lipschitz interval of a whole model: its graph, its steps, what each of them costs, and several of them bounded at once."""
