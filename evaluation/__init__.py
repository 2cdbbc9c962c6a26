"""What a trained model is worth: likelihoods, benchmarks, its texts, comparisons."""
