"""Images on disk, and the input pipeline that reads them on each rank."""
