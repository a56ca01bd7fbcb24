"""A convolution over the frequencies: padding theorems, blocks, their Gram matrices, and the lattice that cells are cut from."""
