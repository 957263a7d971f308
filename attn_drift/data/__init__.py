"""Cases: what a case is, and the files that hold them."""
