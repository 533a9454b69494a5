"""The 4-bit formats, and what other libraries make of them."""
