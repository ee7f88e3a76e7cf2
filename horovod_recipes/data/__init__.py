"""Images on disk, and how a rank reads them."""
