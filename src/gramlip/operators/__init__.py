"""Which linear map a layer is, and how to apply it."""
