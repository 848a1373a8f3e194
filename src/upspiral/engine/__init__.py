"""Sources of sampled tokens: token ids in; ids, logprobs and versions out."""
