"""From logits, or hidden states, to loss and gradient: sweep, objective, sweep."""
