"""Floor 2: networks. Tensors in, tensors out; they know no schedule, loss, text, file or rank."""
