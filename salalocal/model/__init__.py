"""The network: modules and the states they read and write, for the engine; `config` alone needs no torch."""
