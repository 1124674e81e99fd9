"""Floor 2: pixels: decoding, resizing, and the toy world's pictures."""
