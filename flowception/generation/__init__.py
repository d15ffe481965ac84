"""From a run directory to clips: the network as a predictor, context from files, videos and pictures of growth."""
