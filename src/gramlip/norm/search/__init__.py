"""Which frequencies can hold the norm: a lower side moved uphill, and cells that are proved or cut."""
