"""The tests mirror the package. A regular package, so that no other package named tests can shadow it."""
