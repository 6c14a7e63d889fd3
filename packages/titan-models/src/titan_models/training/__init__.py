"""Training-time side computations of modules: auxiliary losses and step counters."""
