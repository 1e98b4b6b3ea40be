"""What a trained model is worth on rows it has not seen: its loss on them, and its answers. Knows no Ray."""
