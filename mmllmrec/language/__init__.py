"""Language: what a local model writes about items and users, and how it judges them."""
