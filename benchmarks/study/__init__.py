"""What LARS does to accuracy and to the norms of gradients."""
