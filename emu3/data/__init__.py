"""What the model learns from: pictures, captions and the documents made of them."""
