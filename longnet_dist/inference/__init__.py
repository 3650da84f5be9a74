"""What a trained model is asked for: bits per byte by position."""
