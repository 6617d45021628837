"""Training data: codes, images, videos, and the documents made of them."""
