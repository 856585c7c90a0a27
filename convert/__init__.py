"""Published weights, in and out. Above model, data and common, since a checkpoint is all three: weights, vocabulary, recipe."""
