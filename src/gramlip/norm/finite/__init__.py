"""The layer of a known size itself: its lower side, its own certificate, and what the boundary adds."""
