"""What runs: the streamed module, its units, its passes."""
