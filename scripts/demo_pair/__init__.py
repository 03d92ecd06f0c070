"""Recipe of the embedded pair: a small and a large causal language model that share one tokenizer."""
