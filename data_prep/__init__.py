"""Scripts that prepare data, and the encoder behind them."""
