"""Other libraries' models on these operations."""
