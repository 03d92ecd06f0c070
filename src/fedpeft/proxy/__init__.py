"""Black-box language models, and decoding that steers them with a small model that was tuned federatedly."""
