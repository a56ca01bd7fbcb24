"""The certified norm of one linear map: its blocks, the search over frequencies, the finite layer, the methods and `bound`."""
